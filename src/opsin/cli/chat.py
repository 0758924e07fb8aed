"""`opsin chat PICTURE…`: a conversation about pictures in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.ask import follow, notices, show_limits
from opsin.cli.console import Working, say
from opsin.core.errors import BadInput
from opsin.core.sampling import SamplingParams
from opsin.core.settings import EngineSettings

if TYPE_CHECKING:
    from opsin.api import Opsin
    from opsin.prompt import Message

HELP = "Type a question; /picture FILE adds a picture to the next one, /new starts again, /bye or Ctrl-D ends."


def chat(
    pictures: Annotated[list[str] | None, typer.Argument(metavar="PICTURE…", help="files or addresses")] = None,
    *,
    model: o.Model = None,
    mmproj: o.Mmproj = None,
    ctx: o.Ctx = None,
    gpu_layers: o.GpuLayers = None,
    device: o.Device = None,
    mmproj_device: o.MmprojDevice = None,
    threads: o.Threads = None,
    threads_batch: o.ThreadsBatch = None,
    max_tokens: o.MaxTokens = None,
    max_seconds: o.MaxSeconds = None,
    temperature: o.Temperature = None,
    seed: o.Seed = None,
    guard: o.UseGuard = True,
    disk_cache: o.DiskCache = None,
    thinking: o.Thinking = None,
    max_thinking_tokens: o.MaxThinking = None,
    system: o.System = None,
    verbose: o.Verbose = None,
) -> None:
    """Talk about pictures; every question knows what was said before.

    Options can also be set in opsin.toml or OPSIN_* environment variables.
    """
    engine = {**o.fields_of(EngineSettings, locals()), "parallel": 1}
    params = o.fields_of(SamplingParams, locals())
    with Working("loading the model") as working:
        from opsin.api import Opsin

        with Opsin(**engine) as opsin:
            working.stop()
            notices(opsin)
            say(HELP)
            _Conversation(opsin, system, params, list(pictures or [])).run()


class _Conversation:
    """What was said so far; a turn that fails is taken back, and nothing else is lost."""

    def __init__(self, opsin: Opsin, system: str | None, params: dict[str, Any], pictures: list[str]) -> None:
        self._opsin = opsin
        self._system = system
        self._params = params
        self._messages: list[Message] = []
        self._first = [opsin.picture(source) for source in pictures]
        self._next = list(self._first)

    def run(self) -> None:
        """Read lines until the end."""
        while (line := self._read()) is not None:
            try:
                self._handle(line)
            except BadInput as error:
                say(f"opsin: {error}")

    def _handle(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/picture" and rest.strip():
            self._next.append(self._opsin.picture(rest.strip()))
            say("(the picture goes with your next question)")
        elif command == "/new":
            self._messages, self._next = [], list(self._first)
            say("(a new conversation about the same pictures)")
        elif command.startswith("/"):
            say(HELP)
        elif line:
            self._ask(line)

    def _ask(self, question: str) -> None:
        from opsin.prompt import Message

        messages = self._messages or ([Message("system", self._system)] if self._system else [])
        turn = Message("user", [*self._next, question])
        with Working("thinking") as working:
            stream = self._opsin.submit([*messages, turn], **self._params)
            try:
                answer = follow(stream, working)
            except KeyboardInterrupt:
                stream.cancel()
                say("(stopped)")
                return
        show_limits(answer)
        self._messages = [*messages, turn, Message("assistant", answer.text)]
        self._next = []

    @staticmethod
    def _read() -> str | None:
        if sys.stdin is None:
            return None
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        return None if line == "/bye" else line
