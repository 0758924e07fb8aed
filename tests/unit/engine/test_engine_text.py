from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.engine.output import AnswerText, StopStrings

# Few letters, so that stop strings occur, overlap and nearly occur all the time.
few_letters = st.text(alphabet="ab\né", max_size=60)
stop_lists = st.lists(st.text(alphabet="ab\né", min_size=1, max_size=5), max_size=4)
cuts = st.lists(st.integers(0, 240), max_size=12)


def split(whole, cuts):
    borders = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(borders)]


def cut_before_first_stop(text, stops):
    """By trying every end: the first character at which some stop string is complete, the longest one there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def read(pieces):
    """What an answer of these tokens shows piece by piece, and behind the last."""
    output = AnswerText()
    shown = ["".join(delta.text for delta in output.feed(7, piece)) for piece in pieces]
    return shown, "".join(delta.text for delta in output.finish())


@given(st.text(max_size=60), cuts)
def test_utf8_any_split_of_valid_bytes_gives_the_text(text, cuts):
    shown, rest = read(split(b"x" + text.encode(), cuts))
    assert "".join(shown) + rest == "x" + text


@pytest.mark.slow
@given(st.lists(st.sampled_from([b"a", b"\xff", b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xf0\x9f", b"\xed\xa0"])), cuts)
def test_utf8_any_split_of_any_bytes_equals_decoding_them_whole(pieces, cuts):
    whole = b"".join(pieces)
    shown, rest = read(split(whole, cuts))
    assert "".join(shown) + rest == whole.decode("utf-8", "replace")


def test_utf8_a_character_waits_for_its_last_byte():
    assert read(bytes([byte]) for byte in "🙂!".encode()) == (["", "", "", "🙂", "!"], "")


def test_utf8_an_unfinished_character_is_replaced_only_at_the_end():
    assert read([b"ok\xe2\x82"]) == (["ok"], "\ufffd")


@pytest.mark.slow
@given(few_letters, stop_lists, cuts)
def test_stops_any_split_equals_searching_the_whole_text(text, stops, cuts):
    reader = StopStrings(stops)
    shown = "".join(map(reader.feed, split(text, cuts))) + reader.flush()
    assert (shown, reader.met) == cut_before_first_stop(text, stops)


@given(few_letters, stop_lists)
def test_stops_hold_back_exactly_what_may_become_one(text, stops):
    reader = StopStrings(stops)
    seen = shown = ""
    for char in text:
        seen += char
        shown += reader.feed(char)
        if reader.met:
            return
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
        longest = max((len(start) for start in beginnings if seen.endswith(start)), default=0)
        assert shown == seen[: len(seen) - longest]


def test_stop_across_three_tokens_is_not_shown():
    reader = StopStrings(["</s>"])
    assert [reader.feed(text) for text in ("A dog.<", "/s")] == ["A dog.", ""]
    assert not reader.met
    assert [reader.feed(text) for text in ("> and more", "later")] == ["", ""]
    assert reader.met
    assert reader.flush() == ""


def test_text_that_only_looked_like_a_stop_is_delivered():
    reader = StopStrings(["\nUSER:"])
    assert reader.feed("one\nUS") == "one"
    assert reader.feed("B stick\n") == "\nUSB stick"
    assert reader.flush() == "\n"


def test_the_stop_that_is_complete_first_wins_and_the_longer_of_two_that_end_together():
    assert StopStrings(["abcd", "bc"]).feed("xabcd") == "xa"
    assert StopStrings(["bc", "abc"]).feed("xabc") == "x"


def test_without_stops_text_passes_through():
    assert StopStrings([]).feed("all of it") == "all of it"
