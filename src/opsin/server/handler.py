"""One request to the model, from its entry to the last byte of its answer, in one place that frees everything."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from opsin.core.answer import Answer, Finished, TextDelta
from opsin.core.errors import OpsinError
from opsin.core.prompt import Prompt
from opsin.core.sampling import SamplingParams
from opsin.server.context import Context
from opsin.server.errors import as_tuple, dumps, error_body
from opsin.server.model import ServedModel
from opsin.server.pixels import current_holder
from opsin.server.request_stats import RequestStats
from opsin.worker import AnswerStream

KEEP_ALIVE_SECONDS = 5.0
"""How long nothing may go out before the first text: then a comment does, which keeps proxies from hanging up."""
_KEEP_ALIVE = b": the answer is being worked on\n\n"
_GONE_STATUS = 499
_LOG = logging.getLogger("opsin.server")


class ClientGone(Exception):
    """Nobody reads any more."""


class Writer(Protocol):
    """Writes answers in the shape of one API. Frames are bytes of server-sent events, as many as are due."""

    def begin(self) -> bytes:
        """Frames before the first event."""
        ...

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        """Frames for one event of one choice."""
        ...

    def end(self) -> bytes:
        """Frames after every choice is finished."""
        ...

    def failed(self, body: dict[str, Any]) -> bytes:
        """The frame that tells of an error in the middle of a stream."""
        ...

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The whole answer, one element a choice."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """What the model is asked: a prompt and parameters a choice; and who writes the answer."""

    asked: list[tuple[Prompt, SamplingParams]]
    writer: Writer
    stream: bool
    queue_ms: float = 0.0
    """How long it waited for its key's turn before the engine got it."""


class CompletionHandler(Response):
    """The response to a request for answers: does everything when it is sent, and undoes it however that ends.

    `prepare` turns the request into a job for the loaded model. What goes wrong before the first byte is raised, for
    the error handlers; what goes wrong later becomes an event of the stream. A client that goes away ends its answers
    at once.
    """

    def __init__(self, request: Request, prepare: Callable[[ServedModel], Awaitable[Job]]) -> None:
        super().__init__()
        self._prepare = prepare
        self._context: Context = request.app.state.context
        self._stats: RequestStats = request.state.stats
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
            self._stats.status, self._stats.refused = _GONE_STATUS, "cancelled"

    async def _carry_out(self, send: Send) -> None:
        with self._context.model.entered():
            model = self._context.model.model()
            model.engine.wake()  # it loads while images are decoded
            self._stats.model = model.name
            job = await self._prepare(model)
            self._stats.images = len({image.sha256 for prompt, _ in job.asked for image in prompt.images})
            self._stats.streamed = job.stream
            streams: list[AnswerStream] = []
            try:
                for prompt, params in job.asked:
                    streams.append(
                        model.engine.submit(
                            prompt,
                            params,
                            queue_ms=job.queue_ms,
                            waited_since=self._stats.began,
                            salt=self._salt,
                        )
                    )
                    self._stats.deltas.append([])
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
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"server-timing", server_timing(whole[0])),
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
                    await _send_part(send, head + part)
                    head, due = b"", now() + KEEP_ALIVE_SECONDS
            last = writer.end()
        except ClientGone:
            raise
        except Exception as error:
            if not started:
                raise
            last = self._failed(writer, error)
        await _send_part(send, last, more=False)

    def _written(self, writer: Writer, index: int, event: TextDelta | Finished) -> bytes:
        if isinstance(event, Finished):
            self._stats.answers.append(event.answer)
        else:
            self._stats.deltas[index].append(time.perf_counter())
        return writer.event(index, event)

    def _failed(self, writer: Writer, error: Exception) -> bytes:
        if isinstance(error, OpsinError):
            status, message, code, param = as_tuple(error)
        else:
            _LOG.error("an answer failed", exc_info=error)
            status, code, param = 500, "internal_error", None
            message = "The server failed on this answer: its log says why."
        self._stats.refused = code
        return writer.failed(error_body(status, message, code, param))


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
                await asyncio.wait_for(self._ready.wait(), seconds)
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
                self._begun(index)
            found += shown
        return found

    def _begun(self, index: int) -> None:
        self._silent.discard(index)
        if not self._silent and self._pixels is not None:
            self._pixels.release()


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


async def _send_part(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


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


def server_timing(answer: Answer) -> bytes:
    """The stages for a browser's tools, in milliseconds; what took no time is left out."""
    stages = answer.stages.as_dict().items()
    return ", ".join(f"{name.removesuffix('_ms')};dur={ms}" for name, ms in stages if ms).encode()
