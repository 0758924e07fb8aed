"""What the terminal sees: sentences and a progress line on standard error, and text that cannot steer it."""

import contextlib
import os
import re
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.status import Status

_hushed = False
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

DEMO = "This is the demo model for drawn scenes; for photographs see `opsin models --known`, then `opsin pull NAME`"


def printable(text: str) -> str:
    """Text without control characters, so that nothing in it steers the terminal; newlines and tabs stay."""
    return _CONTROL.sub("", text)


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


def hush(*, quiet: bool) -> None:
    """Leave out what `tell` and `working` would show, or show it again."""
    global _hushed  # noqa: PLW0603 - one process runs one command
    _hushed = quiet


def tell(sentence: str) -> None:
    """`say` something that is good to know and that `--quiet` leaves out."""
    if not _hushed:
        say(sentence)


def open_standard_streams() -> None:
    """Make standard input, output and error exist, so that no file that is opened later takes their place.

    Input that was closed is empty, output fails when it is written to, and errors that nobody can see are dropped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal of few characters shows a question mark instead of losing the answer.
            stream.reconfigure(errors="replace")


def working(text: str) -> "Status":
    """A line on standard error that says what is done, until it is stopped; nothing where nobody watches."""
    from rich.console import Console

    return Console(stderr=True, quiet=_hushed).status(text)


def is_quiet() -> bool:
    """Whether `hush` is in force."""
    return _hushed
