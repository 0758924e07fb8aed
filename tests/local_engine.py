"""An engine in this process where a server expects a worker."""

from __future__ import annotations

from typing import Any

from opsin.core.errors import EngineClosed, OpsinError
from opsin.engine import Engine, Snapshot
from opsin.prompt import TemplateSource
from opsin.worker import AnswerStream, Loaded, NotReady


class LocalEngine:
    """`state` and `stopped` (why nothing can be asked) are the test's to set; `loading` knows no model yet."""

    def __init__(self, engine: Engine, source: TemplateSource, *, state: str = "ready", is_demo: bool = False) -> None:
        self.engine = engine
        self.state = state
        self.stopped: OpsinError | None = None
        self.progress = 0.0
        self._facts = Loaded(engine.info, engine.limits, source, is_demo, "local", 0.0, placement=engine.placement())

    @property
    def loaded(self) -> Loaded | None:
        return None if self.state == "loading" else self._facts

    @property
    def stats(self) -> Snapshot:
        return self.engine.stats

    @property
    def error(self) -> OpsinError | None:
        return self.stopped or self.engine.error

    def submit(self, *args: Any, **options: Any) -> AnswerStream:
        if self.stopped is not None:
            raise self.stopped
        if self.state == "loading":
            raise NotReady("The model is being loaded: ask again in a moment.")
        return self.engine.submit(*args, **options)

    def wake(self, *, low: bool = False) -> None:
        """It is awake."""

    def close(self) -> None:
        self.stopped = self.stopped or EngineClosed("The engine is closed.")
        self.engine.close()
