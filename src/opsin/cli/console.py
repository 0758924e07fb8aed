"""What the terminal sees: the progress line, the streamed answer, and sentences on standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from opsin.cli.control import ControlStripper, escaped

if TYPE_CHECKING:
    from rich.status import Status


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
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the whole process
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A pipe on Windows may know 256 characters: better a question mark than no answer.
            stream.reconfigure(errors="replace")


class Working:
    """A progress line on standard error until the first token; silent where nobody watches."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._status: Status | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status(self._text)
            self._status.start()
        return self

    def update(self, text: str) -> None:
        """Show what is done now."""
        if self._status is not None:
            self._status.update(text)

    def stop(self) -> None:
        """Clear the line; twice does no harm."""
        status, self._status = self._status, None
        if status is not None:
            status.stop()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.stop()


class Printer:
    """Writes an answer to standard output as it comes, without control sequences; reasoning is dimmed."""

    def __init__(self) -> None:
        self._strippers = {False: ControlStripper(), True: ControlStripper()}
        self._dim = False
        self._colour = sys.stdout.isatty()
        self._newline = True

    def write(self, text: str, *, reasoning: bool = False) -> None:
        """Show a piece of text."""
        if reasoning != self._dim:
            self._switch(reasoning)
        text = self._strippers[reasoning].feed(text)
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._newline = text.endswith("\n")

    def end(self) -> None:
        """Finish the line."""
        if self._dim:
            self._switch(False)
        if not self._newline:
            sys.stdout.write("\n")
        sys.stdout.flush()
        self._newline = True

    def _switch(self, reasoning: bool) -> None:
        self._dim = reasoning
        if self._colour:
            sys.stdout.write("\x1b[2m" if reasoning else "\x1b[0m\n\n")
        elif not reasoning:
            sys.stdout.write("\n\n")
