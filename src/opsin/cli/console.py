"""What the terminal sees: the progress line, the streamed answer, sentences on standard error; no control sequences."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.status import Status

_STRING = "\x1b[\\]PX^_]|[\x9d\x90\x98\x9e\x9f]"  # OSC, DCS, SOS, PM, APC: titles, links, clipboard
_SEQUENCE = re.compile(
    rf"""
    (?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]        # CSI: colours, cursor, screen
    | (?:{_STRING}).*?(?:\x07|\x1b\\|\x9c)
    | \x1b[ -/]*(?![\[\]PX^_])[0-~]         # two-byte escapes
    """,
    re.VERBOSE | re.DOTALL,
)
_UNFINISHED = re.compile(rf"(?:\x1b|\x9b)[ -/]*\Z|(?:\x1b\[|\x9b)[0-?]*[ -/]*\Z|(?:{_STRING}).*\Z", re.DOTALL)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

DEMO = "This is the demo model for drawn scenes; for photographs get a real one: opsin pull llava-1.5-7b"
MAX_HELD = 4096
"""A sequence that is not complete after this many characters never will be; what it hid is dropped."""


class ControlStripper:
    """Removes control sequences from text that streams; the beginning of one is held back. Newlines and tabs stay."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        """What of the text can be shown."""
        text = _SEQUENCE.sub("", self._held + text)
        unfinished = _UNFINISHED.search(text)
        held = unfinished.group() if unfinished else ""
        self._held = held if len(held) <= MAX_HELD else ""
        return _CONTROL.sub("", text[: len(text) - len(held)])


def printable(text: str) -> str:
    """A whole text without control sequences; one that is never finished hides what follows it."""
    return ControlStripper().feed(text)


def escaped(text: str) -> str:
    r"""A sentence or a name as one line, with every control character shown as an escape: `\x1b`, `\n`."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def new_app(help_text: str | None = None, **options: Any) -> typer.Typer:
    """A group of commands, set up as all of ours."""
    plain: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
    return typer.Typer(help=help_text, **plain, **options)


def say(sentence: str) -> None:
    """One line on standard error; control characters and line breaks in it are shown as escapes."""
    with contextlib.suppress(OSError):  # who closed standard error still gets the answer
        sys.stderr.write(f"{escaped(sentence)}\n")
        sys.stderr.flush()


def open_standard_streams() -> None:
    """Make standard input, output and error exist, so that no file that is opened later takes their place.

    Output that was closed fails when it is written to; errors that nobody can see are dropped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the whole process
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal of few characters shows a question mark instead of losing the answer.
            stream.reconfigure(errors="replace")


def working(text: str) -> Status:
    """A line on standard error that says what is done, until it is stopped; nothing where nobody watches."""
    from rich.console import Console

    return Console(stderr=True).status(text)


class Printer:
    """Writes an answer to standard output as it comes, without control sequences; reasoning is dimmed."""

    def __init__(self) -> None:
        self._strippers = {False: ControlStripper(), True: ControlStripper()}
        self._reasoning = False
        self._dim, self._normal = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
        self._last = "\n"

    def write(self, text: str, *, reasoning: bool = False) -> None:
        """Show a piece of text."""
        if reasoning != self._reasoning:
            sys.stdout.write(self._dim if reasoning else f"{self._normal}\n\n")
            self._reasoning = reasoning
        text = self._strippers[reasoning].feed(text)
        sys.stdout.write(text)
        sys.stdout.flush()
        self._last = text[-1:] or self._last

    def end(self) -> None:
        """Finish the line."""
        self.write("")
        self.write("" if self._last == "\n" else "\n")
