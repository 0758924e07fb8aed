"""`opsin chat IMAGE…`: a conversation about images in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from opsin.api import Opsin
from opsin.cli import options as o
from opsin.cli.ask import follow, opened, show_limits
from opsin.cli.console import say, working
from opsin.core.answer import Answer
from opsin.core.errors import BadInput
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings
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
    params = o.given(SamplingParams, flags)
    with opened(flags) as opsin:
        begin = [Message("system", system)] if system else []
        first = [opsin.image(source) for source in images or []]
        said, new = begin, first
        say(HELP)
        while (line := _read_line()) is not None:
            command, _, rest = line.partition(" ")
            try:
                if command == "/image" and rest.strip():
                    new = [*new, opsin.image(rest.strip())]
                    say("(the image goes with your next question)")
                elif command == "/new":
                    said, new = begin, first
                    say("(a new conversation about the same images)")
                elif command.startswith("/"):
                    say(HELP)
                elif line:
                    asked = [*said, Message("user", [*new, line])]
                    if (answer := _answer(opsin, asked, params)) is not None:
                        said, new = [*asked, Message("assistant", answer.text)], []
            except BadInput as error:
                say(f"opsin: {error}")


def _answer(opsin: Opsin, messages: list[Message], params: dict[str, Any]) -> Answer | None:
    """The answer, shown as it comes; None if it was stopped with Ctrl-C."""
    with working("thinking") as line:
        stream = opsin.submit(messages, **params)
        try:
            answer = follow(stream, line)
        except KeyboardInterrupt:
            stream.cancel()
            say("(stopped)")
            return None
    show_limits(answer)
    return answer


def _read_line() -> str | None:
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if line == "/bye" else line
