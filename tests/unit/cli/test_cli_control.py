"""What models print cannot steer the terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.cli.console import MAX_HELD, ControlStripper, escaped, printable

HOSTILE = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b[2J\x1b[Hgone?", "gone?"),
    ("\x1b]0;title\x07text", "text"),
    ("\x1b]52;c;ZWNobyBoaQ==\x1b\\text", "text"),
    ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1bP1$r0m\x1b\\x", "x"),
    ("\x9b31mred", "red"),
    ("a\rb\x08c\x00d", "abcd"),
    ("\u202eevil\u202c", "evil"),
    ("\x1bcreset", "reset"),
    ("tab\tand\nline stay ü🙂", "tab\tand\nline stay ü🙂"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_sequences_are_stripped_whole(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.slow
@given(st.lists(st.sampled_from([text for text, _ in HOSTILE]), max_size=4).map("".join), st.data())
def test_however_the_text_is_cut_the_same_is_shown(text: str, data: st.DataObject) -> None:
    stripper, shown, at = ControlStripper(), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, 5))
        shown += stripper.feed(text[at : at + size])
        at += size
    assert shown == printable(text)


@given(st.text())
def test_no_control_character_ever_comes_through(text: str) -> None:
    assert not any(ord(c) < 32 and c not in "\n\t" for c in printable(text))


def test_a_sequence_that_never_ends_does_not_hold_the_text_for_ever() -> None:
    stripper = ControlStripper()
    assert stripper.feed("\x1b]0;" + "x" * (MAX_HELD + 10)) == ""
    assert stripper.feed("after") == "after"


def test_a_name_is_shown_on_one_line_with_its_escapes() -> None:
    assert escaped("z2\x1b]0;n.png") == "z2\\x1b]0;n.png"
    assert escaped("a\nopsin: fine\u2028\x9b\udcff") == "a\\nopsin: fine\\u2028\\x9b\\udcff"
    assert escaped("ü🙂 x") == "ü🙂 x"
