"""The façade: submit a prompt, read a stream of events."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from opsin.cache import PictureCache, salted
from opsin.core.answer import Started
from opsin.core.backend import Backend, BackendLimits
from opsin.core.errors import ContextOverflow, EngineClosed, OpsinError, QueueFull, again
from opsin.core.layout import Layout, TextRun
from opsin.core.model_info import ModelInfo
from opsin.core.parts import Prompt, TextPart
from opsin.core.placement import Placement
from opsin.core.reasoning import ReasoningStyle
from opsin.core.sampling import SamplingParams
from opsin.core.stages import Stage
from opsin.engine.clock import StageClock
from opsin.engine.coming import Coming
from opsin.engine.guard import Guard
from opsin.engine.loop import Loop
from opsin.engine.native_calls import Watch, unwatched
from opsin.engine.output import Output
from opsin.engine.policy import Policy
from opsin.engine.request import AnswerStream, Request
from opsin.engine.sequence import Sequence
from opsin.engine.stats import Snapshot

T = TypeVar("T")

LAYOUT_WORKERS = 2
PICTURE_BYTES = 512 * 2**20
"""Embeddings kept in memory: about 200 pictures of a 7B LLaVA, in bytes."""


class Engine:
    """A running model. Opening it loads the model; it is closed once, or used in a `with` block.

    Tokenising and preprocessing happen in `LAYOUT_WORKERS` threads of its own, all else in one thread that owns the
    backend. `watch` is told of native calls. Raises what `open_backend` raises.
    """

    def __init__(
        self,
        open_backend: Callable[[], Backend],
        *,
        policy: Policy | None = None,
        pictures: PictureCache | None = None,
        max_tokens: int = 1024,
        now: Callable[[], float] = time.perf_counter,
        watch: Watch = unwatched,
    ) -> None:
        started = now()
        self._now = now
        self._watch = watch
        self._max_tokens = max_tokens
        self._policy = policy or Policy()
        self._numbers = itertools.count()
        self._queued = 0
        self._lock = threading.Lock()
        self.pictures = pictures or PictureCache(PICTURE_BYTES)
        self._loop = Loop(open_backend, self._policy, self.pictures, now, watch)
        self._backend = self._loop.start()
        self._coming = Coming()
        self._tags: dict[ReasoningStyle, dict[int, bytes]] = {}
        self._workers = ThreadPoolExecutor(LAYOUT_WORKERS, thread_name_prefix="opsin-layout")
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
        waited_since: float | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> AnswerStream:
        """Ask. Never blocks; the stream raises what goes wrong from here on.

        `load_ms` is the loading time to be shown in this answer's account. Who loaded several pictures side by side
        says with `waited_since`, a time of the engine's clock, when that began: the account goes back to then. Higher
        `priority` goes first. Requests of different `salt` share nothing that is remembered. Raises EngineClosed,
        EngineDied, or QueueFull.
        """
        if self._loop.error is not None:
            raise again(self._loop.error)
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
        for picture in prompt.pictures:
            clock.add(Stage.FETCH, picture.fetch_ms)
            clock.add(Stage.IMAGE_DECODE, picture.decode_ms)
        if waited_since is not None:
            clock.waited_since(waited_since)
        clock.start()
        clock.switch(Stage.QUEUE)
        stream = AnswerStream(self._loop.wake)
        self._enter(stream)
        try:
            future = self._workers.submit(self._prepare, request, stream, clock)
        except RuntimeError as error:
            self._leave()
            raise EngineClosed("The engine is closed: open a new one.") from error
        # `close` drops what no worker has begun with; whoever waits for it must hear of that.
        future.add_done_callback(lambda f: stream.fail(_closed()) if f.cancelled() else None)
        return stream

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
        self._loop.close()
        self.pictures.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, request: Request, stream: AnswerStream, clock: StageClock) -> None:
        """In a worker: lay the prompt out, and hand the sequence to the engine's thread."""
        layout = None
        try:
            with clock.stage(Stage.OTHER):
                # Here and not where the sampler is made: a schema takes a quarter of a second, and streams would wait.
                self._backend.check(request.params)
            # Who waits here gets a layout without pixels, and comes behind the one that has them.
            with self._coming.turn(picture.sha256 for picture in request.prompt.pictures):
                if stream.done:
                    return  # cancelled while it waited for a worker
                images = tuple(picture.sha256 for picture in request.prompt.pictures)
                with clock.stage(Stage.PREPROCESS), self._watch(images):
                    layout = self._lay_out(request)
                _check_fit(layout.n_tokens, layout.n_image_tokens, self._backend.limits)
                stream.deliver(Started(layout.images, layout.n_tokens))
                sequence = Sequence(
                    request=request,
                    stream=stream,
                    clock=clock,
                    output=self._output(request),
                    layout=layout,
                )
                self._loop.put(sequence)
        except BaseException as error:  # noqa: BLE001 - whoever reads the stream gets it, a worker has no other reader
            if layout is not None:
                layout.close()
            stream.fail(error)

    def _lay_out(self, request: Request) -> Layout:
        def known(identity: str) -> bool:
            name = salted(identity, request.salt)
            return self.pictures.knows(name) or name in self._coming

        prompt = request.prompt
        layout = self._backend.layout(prompt.parts, add_bos=prompt.add_bos, known=known)
        self._coming.announce(layout, request.salt)
        return layout

    def _output(self, request: Request) -> Output:
        prompt, params = request.prompt, request.params
        style = prompt.reasoning
        return Output(
            stop=(*params.stop, *prompt.stop),
            splitter=None if style is None else style.splitter(starts_inside=prompt.thinking),
            guard=Guard() if params.guard else None,
            tags={} if style is None else self._tag_tokens(style),
        )

    def _tag_tokens(self, style: ReasoningStyle) -> dict[int, bytes]:
        """The control tokens among a style's tags, with the text they stand for."""
        found = self._tags.get(style)
        if found is None:
            found = {}
            for tag in style.tags:
                layout = self._backend.layout([TextPart(tag)], add_bos=False)
                tokens = [token for run in layout.runs if isinstance(run, TextRun) for token in run.tokens]
                layout.close()
                if len(tokens) == 1 and not self._backend.piece(tokens[0]):
                    found[tokens[0]] = tag.encode()
            self._tags[style] = found
        return found


def _closed() -> EngineClosed:
    return EngineClosed("The engine was closed before the answer was complete.")


def _check_fit(n_tokens: int, n_image_tokens: int, limits: BackendLimits) -> None:
    """A prompt needs its cells and one more for the first new token."""
    if n_tokens == 0:
        raise ContextOverflow("The prompt is empty: ask a question.")
    if n_tokens >= limits.n_ctx_seq:
        pictures = f", {n_image_tokens} of them for pictures" if n_image_tokens else ""
        raise ContextOverflow(
            f"The prompt takes {n_tokens} tokens{pictures}, and the context holds {limits.n_ctx_seq}"
            f"{'' if limits.shared else ' for each of the parallel answers'}: ask for a larger one (--ctx), "
            f"{'' if limits.shared else 'for fewer answers at a time (--parallel), '}or for fewer or smaller pictures."
        )
