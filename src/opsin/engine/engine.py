"""The façade: submit a prompt, read a stream of events."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from opsin.cache import EmbeddingCache
from opsin.core.answer import Stage
from opsin.core.backend import Backend, BackendLimits
from opsin.core.errors import EngineClosed, OpsinError, QueueFull, copy_of
from opsin.core.model_info import ModelInfo
from opsin.core.placement import Placement
from opsin.core.request import Prompt, SamplingParams
from opsin.engine.clock import StageClock
from opsin.engine.loop import Loop
from opsin.engine.native_calls import Watch, unwatched
from opsin.engine.policy import Policy
from opsin.engine.request import AnswerStream, Request, Wake, wake_readers
from opsin.engine.sequence import Sequence
from opsin.engine.stats import Snapshot

T = TypeVar("T")

PREPARE_WORKERS = 2
COMPILE_WORKERS = 1
IMAGE_BYTES = 512 * 2**20
"""Embeddings kept in memory: about 200 images of a 7B LLaVA, in bytes."""


class Engine:
    """A running model. Opening it loads the model; it is closed once, or used in a `with` block.

    Tokenising and preprocessing happen in `PREPARE_WORKERS` threads, for requests with a schema or grammar in
    `COMPILE_WORKERS` others, all else in one thread that owns the backend. `wake` is called on that thread with the
    streams that got events in a step; by default it wakes their readers. `watch` is told of native calls. Raises what
    `open_backend` raises.
    """

    def __init__(
        self,
        open_backend: Callable[[], Backend],
        *,
        policy: Policy | None = None,
        images: EmbeddingCache | None = None,
        max_tokens: int = 1024,
        now: Callable[[], float] = time.perf_counter,
        wake: Wake = wake_readers,
        watch: Watch = unwatched,
    ) -> None:
        started = now()
        self._now = now
        self._max_tokens = max_tokens
        self._policy = policy or Policy()
        self._numbers = itertools.count()
        self._queued = 0
        self._lock = threading.Lock()
        self._wake = wake
        self.images = images or EmbeddingCache(IMAGE_BYTES)
        self._loop = Loop(open_backend, self._policy, self.images, now, wake=wake, watch=watch)
        self._backend = self._loop.start()
        self._loop.on_pixels_needed = self._prepare_pixels
        self._workers = ThreadPoolExecutor(PREPARE_WORKERS, thread_name_prefix="opsin-prepare")
        # A schema may take long to compile: prompts without one do not wait for it.
        self._compilers = ThreadPoolExecutor(COMPILE_WORKERS, thread_name_prefix="opsin-compile")
        self.load_ms = (now() - started) * 1e3

    @property
    def info(self) -> ModelInfo:
        """Names of the loaded pair."""
        return self._backend.info

    @property
    def limits(self) -> BackendLimits:
        """Sizes of the loaded pair."""
        return self._backend.limits

    @property
    def error(self) -> OpsinError | None:
        """Why nothing can be asked any more; None while the engine lives."""
        return self._loop.error

    @property
    def stats(self) -> Snapshot:
        """Counters since the start, and what is so now."""
        return self._loop.stats.snapshot

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        load_ms: float = 0.0,
        queue_ms: float = 0.0,
        waited_since: float | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> AnswerStream:
        """Ask. Never blocks; the stream raises what goes wrong from here on.

        `load_ms` is the loading time to be shown in this answer's stages, `queue_ms` how long it waited for its turn
        before. `waited_since` is when the caller began to load the images side by side, in seconds of the engine's
        clock: the stages go back to then. Higher `priority` goes first. Requests of different `salt` share nothing
        that is remembered. Raises EngineClosed, EngineDied, or QueueFull.
        """
        if self._loop.error is not None:
            raise copy_of(self._loop.error)
        params = params or SamplingParams()
        request = Request(
            prompt=prompt,
            params=params,
            max_tokens=params.max_tokens or self._max_tokens,
            seed=secrets.randbits(31) if params.seed is None else params.seed,
            deadline=None if params.max_seconds is None else self._now() + params.max_seconds,
            priority=priority,
            salt=salt,
            number=next(self._numbers),
        )
        clock = StageClock(self._now)
        clock.add(Stage.LOAD, load_ms)
        for image in prompt.images:
            clock.add(Stage.FETCH, image.fetch_ms)
            clock.add(Stage.IMAGE_DECODE, image.decode_ms)
        clock.add(Stage.QUEUE, queue_ms)
        if waited_since is not None:
            clock.waited_since(waited_since)
        clock.start()
        clock.switch(Stage.QUEUE)
        stream = AnswerStream(self._loop.wake, self._wake)
        self._enter(stream)
        constrained = params.json_schema is not None or params.grammar is not None
        workers = self._compilers if constrained else self._workers
        self._work(workers, lambda: self._prepare(request, stream, clock), stream)
        return stream

    @staticmethod
    def _work(workers: ThreadPoolExecutor, work: Callable[[], None], stream: AnswerStream) -> None:
        """Do it in a worker; whatever goes wrong ends the stream. Raises EngineClosed."""

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - the stream's reader gets it, a worker has no other
                stream.fail(error)

        try:
            future = workers.submit(run)
        except RuntimeError as error:
            stream.fail(_closed())
            raise EngineClosed("The engine is closed: open a new one.") from error
        # `close` drops what no worker has begun with; whoever waits for it must hear of that.
        future.add_done_callback(lambda f: stream.fail(_closed()) if f.cancelled() else None)

    def _enter(self, stream: AnswerStream) -> None:
        """Count a request until its stream ends. Raises QueueFull."""
        with self._lock:
            limit = self._policy.parallel + self._policy.max_queue
            if self._queued >= limit:
                raise QueueFull(f"{self._queued} requests are running or waiting already: try again in a moment.")
            self._queued += 1
        stream.on_end = self._leave

    def _leave(self) -> None:
        with self._lock:
            self._queued -= 1

    def placement(self) -> Placement:
        """Prove where encoder and language model run, by running them once; not while answers are timed."""
        return self.call(lambda backend: backend.placement())

    def call(self, work: Callable[[Backend], T]) -> T:
        """Do `work` on the engine's thread between two steps. Raises EngineClosed, EngineDied and what `work` does."""
        return self._loop.call(work).result()

    def close(self) -> None:
        """End everything: running answers fail with EngineClosed. Twice does no harm."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._compilers.shutdown(wait=True, cancel_futures=True)
        self._loop.close()
        self.images.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, request: Request, stream: AnswerStream, clock: StageClock) -> None:
        sequence = self._loop.prepare.sequence(request, stream, clock)
        if sequence is not None:
            self._hand_over(sequence)

    def _prepare_pixels(self, sequence: Sequence) -> None:
        """On the engine's thread: prepare an image that nobody encoded; its sequence comes again."""

        def work() -> None:
            try:
                self._loop.prepare.pixels(sequence)
            except BaseException as error:  # noqa: BLE001 - the stream's reader gets it
                sequence.stream.fail(error)
            self._hand_over(sequence)  # also when that failed: the engine's thread frees what it holds

        try:
            self._work(self._workers, work, sequence.stream)
        except EngineClosed:
            sequence.tokenized.close()

    def _hand_over(self, sequence: Sequence) -> None:
        try:
            self._loop.put(sequence)
        except OpsinError:
            sequence.tokenized.close()
            raise


def _closed() -> EngineClosed:
    return EngineClosed("The engine was closed before the answer was complete.")
