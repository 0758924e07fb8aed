"""The engine in this process as a driver: the same work as a server does, without the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

from opsin.core.answer import Finished, TextDelta, Usage
from opsin.core.errors import Cancelled
from opsin.core.sampling import SamplingParams
from opsin.core.settings import MediaSettings
from opsin.engine import Engine
from opsin.media import load_picture
from opsin.prompt import Message, PromptBuilder


class EngineDriver:
    """Reads the picture's bytes, writes the prompt (picture, then question), and follows the answer."""

    def __init__(self, engine: Engine, prompts: PromptBuilder, now: Callable[[], float] = time.perf_counter) -> None:
        self._engine = engine
        self._prompts = prompts
        self._now = now
        self._media = MediaSettings()

    def ask(self, picture: bytes, question: str, max_tokens: int) -> Generator[float, None, Usage]:
        """See `workload.Driver`. Raises BadInput, EngineError."""
        loaded = load_picture(picture, self._media)
        prompt = self._prompts.build([Message("user", [loaded, question])])
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, guard=False)
        for event in self._engine.submit(prompt, params):
            if isinstance(event, TextDelta):
                yield self._now()
            elif isinstance(event, Finished):
                return event.answer.usage
        raise Cancelled("The answer ended without its last event.")
