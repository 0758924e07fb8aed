"""The model that is served: whether it can be asked, who is being answered, and an end that waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opsin.core.settings import ServerSettings
from opsin.prompt import PromptBuilder
from opsin.worker import Loaded, NotReady, WorkerEngine

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 3.0
"""How long handlers may take to tell their clients that the time for running answers is over."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The engine, what writes prompts for its model, and the name it is served under."""

    engine: WorkerEngine
    prompts: PromptBuilder
    name: str
    facts: Loaded


class ModelManager:
    """The one model of a server; used on its event loop alone.

    A handler first enters (`with manager.entered():`), then takes the model (`manager.model()`), and stays entered
    until its answer is complete: a drain waits for whoever has entered and lets nobody in.
    """

    def __init__(self, settings: ServerSettings, engine: WorkerEngine) -> None:
        self._served_name = settings.served_name
        self.engine = engine
        self._model: ServedModel | None = None
        self._draining = False
        self._entered = 0
        self._nobody = asyncio.Event()
        self._nobody.set()

    @property
    def state(self) -> str:
        """The engine's state, or `draining`."""
        return "draining" if self._draining else self.engine.state

    @property
    def ready(self) -> bool:
        """Whether requests are answered; an unloaded model is loaded again by the next one."""
        return self.state in {"ready", "unloaded", "reloading"}

    @property
    def running(self) -> int:
        """Requests that have entered and not left."""
        return self._entered

    @property
    def loaded(self) -> ServedModel | None:
        """The model, also while it is unloaded; None until it was loaded for the first time. Raises BadPrompt."""
        facts = self.engine.loaded
        if facts is not None and (self._model is None or self._model.facts is not facts):
            name = self._served_name or Path(facts.info.llm_file).stem
            same = self._model is not None and self._model.facts.source == facts.source
            prompts = self._model.prompts if self._model is not None and same else PromptBuilder(facts.source)
            self._model = ServedModel(self.engine, prompts, name, facts)
        return self._model

    def model(self) -> ServedModel:
        """The model to ask. Raises NotReady before it was loaded for the first time, and when it cannot be."""
        model = self.loaded
        if model is None or self.engine.state == "failed":
            raise NotReady("The model is being loaded: ask again in a moment (GET /ready says when).")
        return model

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Around each request that is to be answered by the model. Raises NotReady while the server drains."""
        if self._draining:
            raise NotReady("The server is about to end and takes no new requests: ask again in a moment.")
        self._entered += 1
        self._nobody.clear()
        try:
            yield
        finally:
            self._entered -= 1
            if not self._entered:
                self._nobody.set()

    async def drain(self, seconds: float) -> bool:
        """Let nobody in, wait for running answers, then end what still runs; True when none was cut off."""
        self._draining = True
        whole = await self._empty(seconds)
        if not whole:
            log.warning("%d answers still ran after %g s and are cut off", self._entered, seconds)
        await asyncio.to_thread(self.engine.close)
        if not whole:
            await self._empty(LAST_WORDS_SECONDS)
        return whole

    async def _empty(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._nobody.wait(), seconds)
        except TimeoutError:
            return False
        return True
