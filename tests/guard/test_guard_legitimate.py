"""The guard leaves alone what is repetitive by nature."""

from __future__ import annotations

from legitimate import KINDS, MIN_TOKENS, TEST_SEEDS, texts

from opsin.engine.guard import Guard


def test_no_legitimate_text_is_stopped():
    stopped, count = [], 0
    for text in texts(TEST_SEEDS):
        count += 1
        assert len(text.tokens) >= MIN_TOKENS, text.kind
        guard = Guard()
        verdicts = [verdict for token, piece in text.tokens if (verdict := guard.feed(token, piece))]
        if verdicts:
            stopped.append((text.kind, text.seed, verdicts[0]))
    print(f"{count} texts of {len(KINDS)} kinds, {len(stopped)} stopped")
    assert count >= 200
    assert stopped == []


def test_texts_differ_from_seed_to_seed():
    made = {}
    for text in texts(TEST_SEEDS):
        made.setdefault(text.kind, set()).add("".join(piece for _, piece in text.tokens))
    assert {kind for kind, versions in made.items() if len(versions) == 1} <= {
        "multiplication_table",
        "multiplication_grid",
    }
