"""What models print cannot steer the terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.cli.console import escaped, printable

HOSTILE = [
    ("\x1b[31mred\x1b[0m", "[31mred[0m"),
    ("\x1b]52;c;ZWNobyBoaQ==\x1b\\text", "]52;c;ZWNobyBoaQ==\\text"),
    ("\x1b]0;title\x07text", "]0;titletext"),
    ("\x9b31mred", "31mred"),
    ("a\rb\x08c\x00d", "abcd"),
    ("\u202eevil\u202c", "evil"),
    ("tab\tand\nline stay ü🙂", "tab\tand\nline stay ü🙂"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_control_characters_are_left_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_no_control_character_ever_comes_through(text: str) -> None:
    assert not any((ord(c) < 32 or 127 <= ord(c) < 160) and c not in "\n\t" for c in printable(text))


def test_a_name_is_shown_on_one_line_with_its_escapes() -> None:
    assert escaped("z2\x1b]0;n.png") == "z2\\x1b]0;n.png"
    assert escaped("a\nopsin: fine\u2028\x9b\udcff") == "a\\nopsin: fine\\u2028\\x9b\\udcff"
    assert escaped("ü🙂 x") == "ü🙂 x"
