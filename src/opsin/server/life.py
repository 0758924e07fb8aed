"""The model's life on the server: loading, warm-up, ready, unloaded while idle, draining."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from opsin.core.errors import BadInput, EngineError, OpsinError, again
from opsin.core.placement import Placement
from opsin.core.sampling import SamplingParams
from opsin.core.server_settings import ServerSettings
from opsin.prompt import Message
from opsin.server.ledger import Ledger, NoLedger
from opsin.server.model import LoadedModel

log = logging.getLogger(__name__)

State = Literal["loading", "warming", "ready", "draining", "unloaded", "failed"]

LAST_WORDS_SECONDS = 3.0
"""How long handlers may take to tell their clients that the time for running answers is over."""
_LOOK_SECONDS = 0.5


class NotReady(EngineError):
    """The model is not loaded yet, or the server is about to end; `retry_after` is in seconds."""

    code = "not_ready"
    http_status = 503
    retry_after = 2


class PictureBlocked(BadInput):
    """The picture was being worked on at two deaths of the process."""

    code = "picture_blocked"
    http_status = 422


class Life:
    """One model from its loading to its end; used on the server's event loop alone.

    A handler first enters (`with life.entered():`), then takes the model (`await life.model()`), and stays entered
    until its answer is complete: a drain waits for whoever has entered and lets nobody in.
    """

    def __init__(
        self,
        settings: ServerSettings,
        open_model: Callable[[], LoadedModel],
        *,
        ledger: Ledger | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._open_model = open_model
        self._ledger: Ledger = ledger or NoLedger()
        self._now = now
        self._model: LoadedModel | None = None
        self._changing = asyncio.Lock()
        self._entered = 0
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._used = now()
        self.state: State = "loading"
        self.placement: Placement | None = None
        """Where encoder and language model ran in the warm-up; None before it."""

    @property
    def ready(self) -> bool:
        """Whether requests are answered; an unloaded model is loaded again by the next one."""
        return self.state in {"ready", "unloaded"}

    @property
    def running(self) -> int:
        """Requests that have entered and not left."""
        return self._entered

    @property
    def loaded(self) -> LoadedModel | None:
        """The model if it is in memory; asking does not load it."""
        return self._model

    async def start(self) -> None:
        """Load the model and warm it up. Raises ModelError, BadParameter, EngineError."""
        try:
            self._model = await asyncio.to_thread(self._open_model)
            if self.state == "loading":
                self.state = "warming"
            self.placement = await asyncio.to_thread(_warm_up, self._model)
        except BaseException:
            self.state = "failed"
            raise
        self._used = self._now()
        if self.state == "warming":
            self.state = "ready"

    async def model(self) -> LoadedModel:
        """The loaded model; one that was unloaded is waited for, and its `load_ms` says how long. Raises NotReady."""
        self._used = self._now()
        if self._model is not None and self.state in {"ready", "draining"}:
            return self._model
        if self.state == "unloaded":
            return await self._load_again()
        raise NotReady(
            "The server is about to end: ask again in a moment."
            if self.state == "draining"
            else "The model is being loaded: ask again in a moment (GET /ready says when)."
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Around each request that is to be answered by the model. Raises NotReady while the server drains."""
        if self.state == "draining":
            raise NotReady("The server is about to end and takes no new requests: ask again in a moment.")
        self._entered += 1
        self._nobody.clear()
        try:
            yield
        finally:
            self._entered -= 1
            self._used = self._now()
            if not self._entered:
                self._nobody.set()

    @contextmanager
    def in_flight(self, identities: Iterable[str]) -> Iterator[None]:
        """Around the work on pictures, by their `sha256`, before the engine gets them. Raises PictureBlocked."""
        flying = sorted(set(identities))
        if not self._ledger.blocked.isdisjoint(flying):
            raise PictureBlocked(
                "A picture of this request was being worked on both times when the model's process fell, so it is "
                "refused: send another, or the same one in another size."
            )
        self._ledger.begin(flying)
        try:
            yield
        finally:
            self._ledger.end(flying)

    async def watch(self) -> None:
        """Unload the model when nobody used it for long. Runs until the engine dies, and raises its error."""
        limit = self._settings.idle_unload_seconds
        while True:
            await asyncio.sleep(_LOOK_SECONDS if limit is None else min(_LOOK_SECONDS, limit / 4))
            if self.state == "draining":
                return
            if self._model is not None and self._model.engine.error is not None:
                self.state = "failed"
                raise again(self._model.engine.error)
            if limit is not None and self._is_idle(limit):
                await self._unload()

    async def drain(self, seconds: float) -> bool:
        """Let nobody in, wait for running answers, then end what still runs; True when none was cut off."""
        self.state = "draining"
        whole = await self._empty(seconds)
        if not whole:
            log.warning("%d answers still ran after %g s and are cut off", self._entered, seconds)
        await self.close()
        if not whole:
            await self._empty(LAST_WORDS_SECONDS)
        return whole

    async def close(self) -> None:
        """Free the model; running answers fail with EngineClosed. Twice does no harm."""
        async with self._changing:
            model, self._model = self._model, None
            if model is not None:
                await asyncio.to_thread(model.close)

    def _is_idle(self, seconds: float) -> bool:
        return self.state == "ready" and not self._entered and self._now() - self._used >= seconds

    async def _unload(self) -> None:
        self.state = "unloaded"
        await self.close()
        log.info("model unloaded: nobody asked for a while; the next request loads it again")

    async def _load_again(self) -> LoadedModel:
        began = self._now()
        async with self._changing:  # one loads, the others wait for it
            if self.state == "draining" and self._model is None:
                raise NotReady("The server is about to end: ask again in a moment.")
            if self._model is None:
                self._model = await asyncio.to_thread(self._open_model)
            if self.state == "unloaded":
                self.state = "ready"
            self._used = self._now()
            return replace(self._model, load_ms=(self._used - began) * 1e3)

    async def _empty(self, seconds: float) -> bool:
        waiting = asyncio.create_task(self._nobody.wait())
        done, _ = await asyncio.wait({waiting}, timeout=seconds)
        waiting.cancel()
        return bool(done)


def _warm_up(model: LoadedModel) -> Placement:
    """Encode a picture and draw a few tokens, so that weights are in memory and graphs are built.

    The encode is the one that proves where the encoder runs: it goes past the caches, so it is a real one at every
    start, and nothing of it is remembered.
    """
    placement = model.engine.placement()
    prompt = model.prompts.build([Message("user", "Hello.")])
    params = SamplingParams(max_tokens=4, ignore_eos=True, guard=False)
    model.engine.submit(prompt, params, salt="warm-up").result()
    return placement


def exit_code_of(error: BaseException) -> int:
    """The code with which a server ends that cannot go on."""
    return error.exit_code if isinstance(error, OpsinError) else 4
