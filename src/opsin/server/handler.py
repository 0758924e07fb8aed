"""One request to the model, from its entry to the last byte of its answer: what handles it and what is known of it."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from opsin.core.answer import Answer, Finished, TextDelta
from opsin.core.prompt import Prompt
from opsin.core.sampling import SamplingParams
from opsin.core.server_settings import ServerSettings
from opsin.server.errors import dumps, error_body, explain
from opsin.server.images import ImageLoader
from opsin.server.limits import Admission, FairQueue
from opsin.server.model import ModelManager, ServedModel
from opsin.server.pixels import current_holder
from opsin.worker import AnswerStream

KEEP_ALIVE_SECONDS = 5.0
"""How long nothing may go out before the first text: then a comment does, which keeps proxies from hanging up."""
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

    def __init__(self, request: Request, prepare: Callable[[ServedModel, Context], Awaitable[Job]]) -> None:
        super().__init__()
        self._prepare = prepare
        self._context: Context = request.app.state.context
        self._stats: RequestStats = request.state.stats
        self._admission: Admission = request.state.admission
        self._salt: str = getattr(request.state, "key", "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - the ASGI signature
        """Carry it out."""

        async def sending(message: Message) -> None:
            try:
                await send(message)
            except OSError as error:
                raise ClientGone from error

        try:
            whole = await unless_gone(receive, self._carry_out(sending))
        except ClientGone:
            whole = False
        if not whole:
            self._stats.status, self._stats.refused = 499, "cancelled"

    async def _carry_out(self, send: Send) -> None:
        stats = self._stats
        with self._context.model.entered():
            model = self._context.model.model()
            model.engine.wake()  # it loads while images are decoded
            stats.model = model.name
            job = await self._prepare(model, self._context)
            stats.images = len({image.sha256 for prompt, _ in job.asked for image in prompt.images})
            stats.streamed = job.stream
            max_seconds = job.asked[0][1].max_seconds
            waited = await self._admission.admit(len(job.asked), max_seconds)
            # The time spent waiting counts towards the limit.
            left = {} if max_seconds is None else {"max_seconds": max(max_seconds - waited, 1e-3)}
            streams: list[AnswerStream] = []
            try:
                for prompt, params in job.asked:
                    streams.append(
                        model.engine.submit(
                            prompt,
                            params.model_copy(update=left),
                            queue_ms=waited * 1e3,
                            waited_since=stats.began,
                            salt=self._salt,
                        )
                    )
                    stats.deltas.append([])
                del prompt
                job.asked.clear()  # the pixels belong to the engine now, which frees them as soon as it can
                await (self._stream if job.stream else self._whole)(job.writer, _Answers(streams), send)
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
        stages = whole[0].stages.as_dict().items()
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

    def __init__(self, streams: Sequence[AnswerStream]) -> None:
        self.count = len(streams)
        self._streams = streams
        self._silent = set(range(len(streams)))
        self._pixels = current_holder()
        self._ready = asyncio.Event()
        for stream in streams:
            stream.read_with(asyncio.get_running_loop(), self._ready)

    async def take(self, seconds: float | None = None) -> list[tuple[int, TextDelta | Finished]]:
        """Everything that has come, by stream; nothing when nothing comes in time. Raises a stream's error."""
        if seconds is None:
            await self._ready.wait()
        else:
            try:
                async with asyncio.timeout(seconds):
                    await self._ready.wait()
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
                if not self._silent and self._pixels is not None:
                    self._pixels.release()
            found += shown
        return found


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work; end it when the client goes away before it is done, and return False. Raises what it raises."""
    doing = asyncio.ensure_future(work)
    going = asyncio.ensure_future(_gone(receive))
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


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def extensions(answer: Answer) -> dict[str, Any]:
    """What Opsin adds to OpenAI's fields: llama-server's timings, stages, images, the guard, what cut the answer."""
    return {
        "timings": asdict(answer.timings),
        "stages": answer.stages.as_dict(),
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
        self.queue = FairQueue(self.settings.parallel, self.settings.max_queue)
