from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.core.errors import BadParameter
from opsin.engine.text import StopStrings, Utf8Stream

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
            return text[: end - max(map(len, complete))], True
    return text, False


@given(st.text(max_size=60), cuts)
def test_utf8_any_split_of_valid_bytes_gives_the_text(text, cuts):
    stream = Utf8Stream()
    assert "".join(map(stream.feed, split(text.encode(), cuts))) + stream.finish() == text


@pytest.mark.slow
@given(st.lists(st.sampled_from([b"a", b"\xff", b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xf0\x9f", b"\xed\xa0"])), cuts)
def test_utf8_any_split_of_any_bytes_equals_decoding_them_whole(pieces, cuts):
    whole = b"".join(pieces)
    stream = Utf8Stream()
    assert "".join(map(stream.feed, split(whole, cuts))) + stream.finish() == whole.decode("utf-8", "replace")


def test_utf8_a_character_waits_for_its_last_byte():
    stream = Utf8Stream()
    assert [stream.feed(bytes([byte])) for byte in "🙂!".encode()] == ["", "", "", "🙂", "!"]
    assert stream.finish() == ""


def test_utf8_an_unfinished_character_is_replaced_only_at_the_end():
    stream = Utf8Stream()
    assert stream.feed(b"ok\xe2\x82") == "ok"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@pytest.mark.slow
@given(few_letters, stop_lists, cuts)
def test_stops_any_split_equals_searching_the_whole_text(text, stops, cuts):
    reader = StopStrings(stops)
    shown, hit = "", False
    for piece in split(text, cuts):
        new, hit = reader.feed(piece)
        shown += new
    shown += reader.flush()
    assert (shown, hit) == cut_before_first_stop(text, stops)


@given(few_letters, stop_lists)
def test_stops_hold_back_exactly_what_may_become_one(text, stops):
    reader = StopStrings(stops)
    seen = shown = ""
    for char in text:
        seen += char
        new, hit = reader.feed(char)
        shown += new
        if hit:
            return
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
        longest = max((len(start) for start in beginnings if seen.endswith(start)), default=0)
        assert shown == seen[: len(seen) - longest]


def test_stop_across_three_tokens_is_not_shown():
    reader = StopStrings(["</s>"])
    assert reader.feed("A dog.<") == ("A dog.", False)
    assert reader.feed("/s") == ("", False)
    assert reader.feed("> and more") == ("", True)
    assert reader.found == "</s>"
    assert reader.feed("later") == ("", True)
    assert reader.flush() == ""


def test_text_that_only_looked_like_a_stop_is_delivered():
    reader = StopStrings(["\nUSER:"])
    assert reader.feed("one\nUS") == ("one", False)
    assert reader.feed("B stick\n") == ("\nUSB stick", False)
    assert reader.flush() == "\n"


def test_the_stop_that_is_complete_first_wins_and_the_longer_of_two_that_end_together():
    assert StopStrings(["abcd", "bc"]).feed("xabcd") == ("xa", True)
    assert StopStrings(["bc", "abc"]).feed("xabc") == ("x", True)


def test_without_stops_text_passes_through():
    assert StopStrings([]).feed("all of it") == ("all of it", False)


def test_an_empty_stop_is_refused_in_a_sentence():
    with pytest.raises(BadParameter, match="leave it out"):
        StopStrings(["x", ""])
