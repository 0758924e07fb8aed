from __future__ import annotations

import itertools
import pickle
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.engine.guard import SPAN, Drift, Guard, Segments, is_cycle, packs_too_well, squeeze


def stopped_at(stream, limit=4000):
    guard = Guard()
    for token, text in itertools.islice(stream, limit):
        verdict = guard.feed(token, text)
        if verdict is not None:
            return verdict
    return None


def words(text):
    return [(hash(word) % 30_000, f" {word}") for word in text.split(" ")]


@pytest.mark.parametrize("period", [1, 2, 7, 40, 53])
def test_a_short_cycle_of_tokens_ends_at_192(period):
    """Tokens without text: a loop of control or unfinished tokens is a cycle too."""
    verdict = stopped_at((token, "") for token in itertools.cycle(range(period)))
    assert verdict is not None
    assert verdict.reason == "cycle"
    assert 192 <= verdict.at_token <= 192 + 3 + 15


@pytest.mark.parametrize(("period", "copies"), [(80, 3), (81, 4), (256, 4)])
def test_a_longer_cycle_of_tokens_ends_with_its_third_or_fourth_copy(period, copies):
    verdict = stopped_at((token, "") for token in itertools.cycle(range(period)))
    assert verdict is not None
    assert copies * period <= verdict.at_token <= copies * period + 3 + 15


def test_a_cycle_with_repeats_inside_is_found():
    """The nearest earlier copy of three tokens is not always one period back: a b c 1 a b c 2."""
    passage = [1, 2, 3, 10, 1, 2, 3, 11, 1, 2, 3, 10, 1, 2, 3, 12]
    verdict = stopped_at((token, "") for token in passage * 20)
    assert verdict is not None
    assert 190 < verdict.at_token < 230


def test_a_cycle_long_after_the_start_is_found():
    rng = random.Random(1)
    noise = [rng.randrange(30_000) for _ in range(5000)]
    verdict = stopped_at(((token, "") for token in noise + [1, 2, 3, 4, 5] * 80), limit=5400)
    assert verdict is not None
    assert 5000 + 190 < verdict.at_token <= 5000 + 200


def test_a_cycle_of_characters_is_found_whatever_its_tokens():
    rng = random.Random(2)
    text, stream = "Wait, let me look again. " * 100, []
    while text:
        cut = rng.randint(1, 6)
        stream.append((rng.randrange(30_000), text[:cut]))
        text = text[cut:]
    verdict = stopped_at(stream)
    assert verdict is not None
    assert verdict.reason == "cycle"
    assert verdict.at_token < 250


def test_a_rule_of_dashes_and_a_chorus_sung_three_times_are_no_runaways():
    chorus = "Oh carry me over, carry me home,\nOver the hill where the wild geese roam.\n"
    assert not is_cycle("The end.\n" + "-" * 120)
    assert not is_cycle("One.\n" + chorus * 3)
    assert is_cycle("One.\n" + chorus * 12)


def test_a_cycle_with_slips_packs_too_well():
    rng = random.Random(3)
    passage = ["the", "dog", "on", "the", "sofa", "and", "the", "cat", "on", "the", "chair", ""]
    stream = []
    while len(stream) < 3000:
        copy = list(passage)
        if rng.random() < 0.5:
            copy[rng.randrange(len(copy))] = rng.choice(passage)
        stream += words(" ".join(copy))
    verdict = stopped_at(stream)
    assert verdict is not None
    assert verdict.reason == "compression"


def test_a_long_passage_quoted_once_more_does_not_pack_too_well():
    rng = random.Random(4)
    passage = "".join(rng.choices("abcdefgh ", k=SPAN // 2))
    assert not packs_too_well(squeeze(passage * 2))


def test_counting_and_logs_go_on():
    assert stopped_at((number, f"{number}\n") for number in itertools.count()) is None
    lines = (f"12:{n // 60 % 60:02d}:{n % 60:02d} request {n} done in {n * 7 % 900} ms\n" for n in itertools.count())
    assert stopped_at((n, line) for n, line in enumerate(lines)) is None


def test_a_list_in_json_is_left_to_the_limit():
    rng = random.Random(5)
    stream = (
        (n, f'{{"label": "{rng.choice(["dog", "cat", "car", "bus", "tree", "sign", "road"])}"}}, ') for n in range(900)
    )
    drift = Drift()
    assert not any(drift.read(text) for _, text in stream)


def test_segments_are_items_sentences_and_rows():
    segments = list(
        Segments().read("The big dog runs. 1. red car\n2. blue car\na, b, c\nTotal 3.50 EUR\nx = f(1)\nend\n")
    )
    assert [segment.words for segment in segments] == [
        ("the", "big", "dog", "runs"),
        ("red", "car"),
        ("blue", "car"),
        ("a", "b", "c"),
        ("total", "3.50", "eur"),
        ("x", "f", "1"),
        ("end",),
    ]
    assert [segment.plain for segment in segments] == [True] * 5 + [False, True]
    assert segments[2].news == 1


def test_the_items_of_a_long_line_are_segments_of_their_own():
    line = ", ".join(f"thing{chr(97 + n)}" for n in range(20)) + ", thinga, thingb, "
    segments = list(Segments().read(line))
    assert [segment.words for segment in segments][-2:] == [("thinga",), ("thingb",)]
    assert [segment.said for segment in segments] == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_a_wrapped_line_is_one_sentence():
    text = "The man in the red coat walks along\nthe river with his old dog.\nThen he rests. "
    assert [len(segment.words) for segment in Segments().read(text)] == [14, 3]


@given(st.text(alphabet="ab1 .,\n{'-", max_size=80), st.lists(st.integers(0, 80), max_size=8))
def test_segments_do_not_depend_on_where_the_text_is_cut(text, cuts):
    text += "\nX\n"
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    streamed = Segments()
    assert [segment for piece in pieces for segment in streamed.read(piece)] == list(Segments().read(text))


@given(st.lists(st.tuples(st.integers(-5, 10**9), st.text(max_size=20)), max_size=100))
def test_no_input_makes_it_raise(stream):
    stopped_at(stream * 3)


def test_lone_surrogates_and_huge_pieces_do_not_make_it_raise():
    stopped_at([(1, "\ud800" * 4000), (2, "x" * 100_000), (3, "1" * 5000 + ".")] * 70)


@pytest.mark.slow
def test_memory_stays_bounded():
    guard, rng = Guard(), random.Random(6)

    def feed(count):
        for _ in range(count):
            guard.feed(rng.randrange(50_000), f" word{rng.randrange(10**6)}x" + rng.choice(["", ",", ".", "\n"]))

    feed(18_000)
    early = len(pickle.dumps(guard))
    feed(18_000)
    assert len(pickle.dumps(guard)) < 1.3 * early < 4 * 2**20


def test_a_token_costs_some_microseconds():
    """20 µs is the promise; the factor of 5 is for slow and busy machines, and waiting does not count."""
    rng = random.Random(7)
    vocabulary = [" " + "".join(rng.choices("abcdefghijklm", k=rng.randint(2, 9))) for _ in range(3000)]
    stream = [(n, rng.choice(vocabulary) + rng.choice(["", "", "", "", "", "", ",", ".", "\n"])) for n in range(6000)]
    guard, times = Guard(), []
    for token, text in stream:
        began = time.thread_time()
        guard.feed(token, text)
        times.append(time.thread_time() - began)
    mean, worst = sum(times) / len(times) * 1e6, sorted(times)[-10] * 1e6
    print(f"guard: {mean:.1f} µs a token, tenth worst call {worst:.0f} µs")
    assert mean < 100
    assert worst < 5000
