"""One request to the model, from its arrival to its last byte: what handles it, and what is known of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsin.core.answer import Answer, Finished, TextDelta
from opsin.core.request import Prompt, SamplingParams
from opsin.core.settings import ServerSettings
from opsin.engine.clock import stage_row
from opsin.prompt import PromptBuilder
from opsin.server.errors import UnknownModel, error_body, explain
from opsin.server.images import FairQueue, ImageLoader, RequestImages
from opsin.server.middleware import Admission, is_loopback
from opsin.server.schema import dumps
from opsin.worker import AnswerStream, Loaded, NotReady, WorkerEngine

_LOG = logging.getLogger("opsin.server")
KEEP_ALIVE_SECONDS = 5.0
"""How long nothing may go out before the first text: then a comment does, which keeps proxies from hanging up."""
LAST_WORDS_SECONDS = 3.0
"""How long handlers may take to tell their clients that the time for running answers is over."""
_KEEP_ALIVE = b": the answer is being worked on\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """Nobody reads any more."""


class Writer:
    """Writes answers in the shape of one API. Frames are bytes of server-sent events, as many as are due."""

    def begin(self) -> bytes:
        """Frames before the first event."""
        return b""

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        """Frames for one event of one choice."""
        raise NotImplementedError

    def end(self) -> bytes:
        """Frames after every choice is finished."""
        return b""

    def failed(self, body: dict[str, Any]) -> bytes:
        """The frame that tells of an error in the middle of a stream; nothing follows it."""
        return b"data: " + dumps(body) + b"\n\n"

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The whole answer, one element a choice."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Job:
    """What the model is asked: a prompt and parameters a choice; and who writes the answer."""

    asked: list[tuple[Prompt, SamplingParams]]
    writer: Writer
    stream: bool


class CompletionHandler(Response):
    """The response to a request for answers: does everything when it is sent, and undoes it however that ends.

    `prepare` turns the request into a job for the loaded model. What goes wrong before the first byte is raised, for
    the error handlers; what goes wrong later becomes an event of the stream. A client that goes away ends its answers
    at once.
    """

    def __init__(self, request: Request, prepare: Callable[[ServedModel, RequestImages], Awaitable[Job]]) -> None:
        super().__init__()
        self._prepare = prepare
        self._context: Context = request.app.state.context
        self._stats: RequestStats = request.state.stats
        self._admission: Admission = request.state.admission
        self._salt: str = request.state.key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - the ASGI signature
        """Carry it out."""

        async def sending(message: Message) -> None:
            try:
                await send(message)
            except OSError as error:
                raise ClientGone from error

        with contextlib.suppress(ClientGone):
            if await unless_gone(receive, self._carry_out(sending)):
                return
        self._stats.status, self._stats.refused = 499, "cancelled"

    async def _carry_out(self, send: Send) -> None:
        stats = self._stats
        images = RequestImages(self._context.images, self._salt)
        with contextlib.closing(images), self._context.model.entered():
            model = self._context.model.model()
            model.engine.wake()  # it loads while images are decoded
            stats.model = model.name
            job = await self._prepare(model, images)
            stats.images = len({image.sha256 for prompt, _ in job.asked for image in prompt.images})
            stats.streamed = job.stream
            max_seconds = job.asked[0][1].max_seconds
            waited = await self._admission.admit(len(job.asked), max_seconds)
            # The time spent waiting counts towards the limit.
            left = {} if max_seconds is None else {"max_seconds": max(max_seconds - waited, 1e-3)}
            streams: list[AnswerStream] = []
            try:
                for prompt, params in job.asked:
                    limited = params.model_copy(update=left)
                    streams.append(
                        model.engine.submit(
                            prompt, limited, queue_ms=waited * 1e3, waited_since=stats.began, salt=self._salt
                        )
                    )
                    stats.deltas.append([])
                del prompt
                job.asked.clear()  # the pixels belong to the engine now, which frees them as soon as it can
                await (self._stream if job.stream else self._whole)(job.writer, _Answers(streams, images), send)
            finally:
                for stream in streams:
                    if not stream.done:
                        stream.cancel()

    async def _whole(self, writer: Writer, answers: _Answers, send: Send) -> None:
        found: dict[int, Answer] = {}
        while len(found) < answers.count:
            for index, event in await answers.take():
                if isinstance(event, Finished):
                    found[index] = event.answer
                else:
                    self._stats.deltas[index].append(time.perf_counter())
        whole = [found[index] for index in range(answers.count)]
        self._stats.answers.extend(whole)
        body = dumps(writer.whole(whole))
        # The stages for a browser's tools, in milliseconds.
        stages = stage_row(whole[0].stages).items()
        timing = ", ".join(f"{name.removesuffix('_ms')};dur={ms}" for name, ms in stages if ms)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"server-timing", timing.encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, writer: Writer, answers: _Answers, send: Send) -> None:
        head, started, running = writer.begin(), False, answers.count
        spoken = False  # tokens that are held back, as those of a call are, keep no connection alive
        now = asyncio.get_running_loop().time
        due = now() + KEEP_ALIVE_SECONDS
        try:
            while running:
                # All that is there goes out at once: a packet for each token would cost more than the token.
                found = await answers.take(None if spoken else due - now())
                running -= sum(isinstance(event, Finished) for _, event in found)
                part = b"".join([self._written(writer, index, event) for index, event in found])
                spoken = spoken or bool(part)
                if not part and not spoken and now() >= due:
                    part = _KEEP_ALIVE
                if part:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                        started = True
                    await send({"type": "http.response.body", "body": head + part, "more_body": True})
                    head, due = b"", now() + KEEP_ALIVE_SECONDS
            last = writer.end()
        except ClientGone:
            raise
        except Exception as error:
            if not started:
                raise
            status, message, code, param = explain(error)
            self._stats.refused = code
            last = writer.failed(error_body(status, message, code, param))
        await send({"type": "http.response.body", "body": last})

    def _written(self, writer: Writer, index: int, event: TextDelta | Finished) -> bytes:
        if isinstance(event, Finished):
            self._stats.answers.append(event.answer)
        else:
            self._stats.deltas[index].append(time.perf_counter())
        return writer.event(index, event)


class _Answers:
    """The streams of one request, read together. The images' share of memory is given back once all have begun."""

    def __init__(self, streams: Sequence[AnswerStream], images: RequestImages) -> None:
        self.count = len(streams)
        self._streams = streams
        self._silent = set(range(len(streams)))
        self._images = images
        self._ready = asyncio.Event()
        for stream in streams:
            stream.read_with(asyncio.get_running_loop(), self._ready)

    async def take(self, seconds: float | None = None) -> list[tuple[int, TextDelta | Finished]]:
        """Everything that has come, by stream; nothing when nothing comes in time. Raises a stream's error."""
        try:
            # Without a limit there is no timer to make and to cancel for each step.
            await (self._ready.wait() if seconds is None else asyncio.wait_for(self._ready.wait(), seconds))
        except TimeoutError:
            return []
        self._ready.clear()
        found: list[tuple[int, TextDelta | Finished]] = []
        for index, stream in enumerate(self._streams):
            events, error = stream.take()
            shown = [(index, event) for event in events if isinstance(event, (TextDelta, Finished))]
            if error is not None and not shown:
                raise error
            if error is not None:
                self._ready.set()  # first what came before it
            if shown and self._silent:
                self._silent.discard(index)
                if not self._silent:
                    self._images.close()
            found += shown
        return found


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work; end it when the client goes away before it is done, and return False. Raises what it raises."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, going = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({doing, going}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            return False
        await doing
        return True
    finally:
        for task in (doing, going):
            task.cancel()
        await asyncio.gather(doing, going, return_exceptions=True)


def extensions(answer: Answer) -> dict[str, Any]:
    """What Opsin adds to OpenAI's fields: llama-server's timings, stages, images, the guard, what cut the answer."""
    return {
        "timings": asdict(answer.timings),
        "stages": stage_row(answer.stages),
        "images": [asdict(image) for image in answer.images],
        "guard": None if answer.guard is None else asdict(answer.guard),
        "limit": answer.limit,
    }


@dataclass(slots=True)
class RequestStats:
    """Filled in while the request runs. Times are `time.perf_counter()`; `began_at` is Unix time.

    `key` is the label of the API key, never the key. `refused` is the error code when there was no complete answer.
    `deltas` holds the times at which pieces of text went out, one list per choice.
    """

    route: str
    key: str = ""
    model: str = ""
    streamed: bool = False
    traceparent: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.perf_counter)
    began_at: float = field(default_factory=time.time)
    ended: float = 0.0
    status: int = 200
    refused: str | None = None
    images: int = 0
    answers: list[Answer] = field(default_factory=list)
    deltas: list[list[float]] = field(default_factory=list)

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the start of the request to the first piece of text; None if there was none."""
        first = min((times[0] for times in self.deltas if times), default=None)
        return None if first is None else first - self.began

    @property
    def longest_pause_s(self) -> float:
        """The longest time between two pieces of text of one choice, in seconds."""
        return max((b - a for times in self.deltas for a, b in itertools.pairwise(times)), default=0.0)


class Watcher(Protocol):
    """Told about each request once, when it has ended."""

    def finished(self, stats: RequestStats) -> None:
        """Take note. Must be quick and never raise."""


@dataclass(slots=True)
class Context:
    """The settings, the model, the image loader, those who are told about each request, and the queue."""

    settings: ServerSettings
    model: ModelManager
    images: ImageLoader
    watchers: tuple[Watcher, ...] = ()
    queue: FairQueue = field(init=False)

    def __post_init__(self) -> None:
        # As many as run may be ready in the engine; the others wait here.
        ahead = min(self.settings.parallel, self.settings.max_queue)
        self.queue = FairQueue(self.settings.parallel + ahead, self.settings.max_queue - ahead)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The engine, what writes prompts for its model, and the name it is served under."""

    engine: WorkerEngine
    prompts: PromptBuilder
    name: str
    facts: Loaded
    settings: ServerSettings

    def check(self, name: str | None) -> None:
        """Raise UnknownModel if only the served name is accepted: with strict_model, and away from loopback."""
        any_will_do = is_loopback(self.settings.host) and not self.settings.strict_model
        if name not in {None, self.name} and not any_will_do:
            raise UnknownModel(str(name), self.name)


class ModelManager:
    """The one model of a server; used on its event loop alone.

    A handler first enters (`with manager.entered():`), then takes the model (`manager.model()`), and stays entered
    until its answer is complete: a drain waits for whoever has entered and lets nobody in.
    """

    def __init__(self, settings: ServerSettings, engine: WorkerEngine) -> None:
        self._settings = settings
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
    def loaded(self) -> ServedModel | None:
        """The model, also while it is unloaded; None until it was loaded for the first time. Raises BadPrompt."""
        facts, known = self.engine.loaded, self._model
        if facts is not None and (known is None or known.facts is not facts):
            name = self._settings.served_name or Path(facts.info.llm_file).stem
            same = known is not None and known.facts.source == facts.source
            prompts = known.prompts if known is not None and same else PromptBuilder(facts.source)
            self._model = ServedModel(self.engine, prompts, name, facts, self._settings)
        return self._model

    def model(self) -> ServedModel:
        """The model to ask. Raises NotReady before it was loaded for the first time, and when it cannot be."""
        model = self.loaded
        if model is None or self.engine.state == "failed":
            raise NotReady("The model is being loaded: ask again in a moment (GET /ready says when).")
        return model

    @contextlib.contextmanager
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
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._nobody.wait(), seconds)
        whole = not self._entered
        if not whole:
            _LOG.warning("%d answers still ran after %g s and are cut off", self._entered, seconds)
        await asyncio.to_thread(self.engine.close)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._nobody.wait(), LAST_WORDS_SECONDS)
        return whole


class StatsMiddleware:
    """Keeps the stats of each request to the API, also of those that no handler sees, and tells the watchers."""

    def __init__(self, app: ASGIApp, watchers: Sequence[Watcher], paths: frozenset[str]) -> None:
        self._app, self._watchers, self._paths = app, watchers, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and tell the watchers when its last byte is out."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        # Any text may stand in a path, also one that would be a line of the log.
        parent = dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1") or None
        stats = RequestStats(scope["path"] if scope["path"] in self._paths else "other", traceparent=parent)
        state = scope.setdefault("state", {})
        state["stats"] = stats

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                stats.status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", stats.id.encode()))
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            stats.status, stats.refused = 500, "internal_error"
            raise
        finally:
            stats.key = state.get("key", "")
            stats.ended = time.perf_counter()
            for watcher in self._watchers:
                watcher.finished(stats)
