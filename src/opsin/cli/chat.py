"""`opsin chat IMAGE…`: a conversation about images in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.ask import follow, opened, show_limits
from opsin.cli.console import say, working
from opsin.core.errors import BadInput
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings

if TYPE_CHECKING:
    from opsin.api import Opsin
    from opsin.prompt import Message

HELP = "Type a question; /image FILE adds an image to the next one, /new starts again, /bye or Ctrl-D ends."


@o.flags_of(SamplingParams, *o.ANSWER)
@o.flags_of(EngineSettings, *o.ENGINE, "image_max_tokens", "image_min_tokens", "disk_cache")
def chat(
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE…", help="files or addresses")] = None,
    *,
    system: o.System = None,
    **flags: Any,
) -> None:
    """Talk about images; every question knows what was said before.

    Options can also be set in opsin.toml or OPSIN_* environment variables.
    """
    with opened(flags) as opsin:
        say(HELP)
        _Conversation(opsin, system, o.given(SamplingParams, flags), images or []).run()


class _Conversation:
    """What was said so far; a turn that fails is taken back, and nothing else is lost."""

    def __init__(self, opsin: Opsin, system: str | None, params: dict[str, Any], images: list[str]) -> None:
        self._opsin = opsin
        self._system = system
        self._params = params
        self._messages: list[Message] = []
        self._first = [opsin.image(source) for source in images]
        self._next = list(self._first)

    def run(self) -> None:
        """Read lines until the end."""
        while (line := _read_line()) is not None:
            command, _, rest = line.partition(" ")
            try:
                if command == "/image" and rest.strip():
                    self._next.append(self._opsin.image(rest.strip()))
                    say("(the image goes with your next question)")
                elif command == "/new":
                    self._messages, self._next = [], list(self._first)
                    say("(a new conversation about the same images)")
                elif command.startswith("/"):
                    say(HELP)
                elif line:
                    self._ask(line)
            except BadInput as error:
                say(f"opsin: {error}")

    def _ask(self, question: str) -> None:
        from opsin.prompt import Message

        messages = self._messages or ([Message("system", self._system)] if self._system else [])
        turn = Message("user", [*self._next, question])
        with working("thinking") as line:
            stream = self._opsin.submit([*messages, turn], **self._params)
            try:
                answer = follow(stream, line)
            except KeyboardInterrupt:
                stream.cancel()
                say("(stopped)")
                return
        show_limits(answer)
        self._messages = [*messages, turn, Message("assistant", answer.text)]
        self._next = []


def _read_line() -> str | None:
    try:
        line = input("> " if sys.stdin and sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt, RuntimeError):  # the last where standard input was closed
        return None
    return None if line == "/bye" else line
