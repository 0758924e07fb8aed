from __future__ import annotations

import pytest

from opsin.core.errors import BadParameter
from synth.vocabulary import SMALLEST, SPACE, make_vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("size", [SMALLEST, 512, 32_000])
def test_a_vocabulary_has_the_size_asked_for_and_no_token_twice(size: int):
    vocabulary = make_vocabulary(size)
    assert (
        len(vocabulary.tokens) == len(vocabulary.scores) == len(vocabulary.types) == len(set(vocabulary.tokens)) == size
    )


def test_control_tokens_and_bytes_stand_where_llama_cpp_expects_them():
    vocabulary = make_vocabulary(512)
    assert vocabulary.tokens[:4] == ("<unk>", "<s>", "</s>", "<0x00>")
    assert vocabulary.tokens[258] == "<0xFF>"
    assert vocabulary.types[:3] == (2, 3, 3)
    assert set(vocabulary.types[3:259]) == {6}
    assert set(vocabulary.types[259:]) == {1}
    assert set(SPACE + "aZ9~!") <= set(vocabulary.tokens)


def test_every_word_can_be_merged_from_two_tokens_of_higher_score():
    vocabulary = make_vocabulary(4000)
    known = dict(zip(vocabulary.tokens[: SMALLEST - 1], [0.0] * SMALLEST, strict=False))
    for token, score in zip(vocabulary.tokens[SMALLEST:], vocabulary.scores[SMALLEST:], strict=True):
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        assert any(known.get(a, -1e9) >= score and known.get(b, -1e9) >= score for a, b in cuts), token
        known[token] = score


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(BadParameter, match="at least"):
        make_vocabulary(SMALLEST - 1)
