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

from opsin.core.answer import Answer, Event, Finished, Started, TextDelta
from opsin.core.errors import OpsinError
from opsin.core.parts import Prompt
from opsin.core.sampling import SamplingParams
from opsin.engine import AnswerStream
from opsin.server.context import Context
from opsin.server.errors import dumps, error_body, told
from opsin.server.model import LoadedModel
from opsin.server.request_stats import RequestStats

KEEP_ALIVE_SECONDS = 5.0
"""How long nothing may go out before the first text: then a comment does, which keeps proxies from hanging up."""
_KEEP_ALIVE = b": the answer is being worked on\n\n"
_WAITING_EVENTS = 64
_GONE_STATUS = 499
_LOG = logging.getLogger("opsin.server")

Found = tuple[int, Event | Exception]


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

    asked: Sequence[tuple[Prompt, SamplingParams]]
    writer: Writer
    stream: bool
    queue_ms: float = 0.0
    """How long it waited for its key's turn before the engine got it."""


class Exchange(Response):
    """The response to a request for answers: does everything when it is sent, and undoes it however that ends.

    `prepare` turns the request into a job for the loaded model. What goes wrong before the first byte is raised, for
    the error handlers; what goes wrong later becomes an event of the stream. A client that goes away ends its answers
    at once.
    """

    def __init__(self, request: Request, prepare: Callable[[LoadedModel], Awaitable[Job]]) -> None:
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
        life = self._context.life
        with life.entered():
            model = await life.model()
            self._stats.model = model.name
            job = await self._prepare(model)
            pictures = {picture.sha256: picture for prompt, _ in job.asked for picture in prompt.pictures}
            self._stats.pictures = len(pictures)
            self._stats.streamed = job.stream
            with life.in_flight(pictures):
                streams: list[AnswerStream] = []
                try:
                    for prompt, params in job.asked:
                        streams.append(
                            model.engine.submit(
                                prompt,
                                params,
                                load_ms=model.load_ms,
                                queue_ms=job.queue_ms,
                                waited_since=self._stats.began,
                                salt=self._salt,
                            )
                        )
                        self._stats.deltas.append([])
                    await (self._stream(job.writer, streams, send) if job.stream else self._whole(job, streams, send))
                finally:
                    for stream in streams:
                        if not stream.done:
                            stream.cancel()

    async def _whole(self, job: Job, streams: Sequence[AnswerStream], send: Send) -> None:
        answers = await asyncio.gather(*(self._collect(i, stream) for i, stream in enumerate(streams)))
        self._stats.answers.extend(answers)
        body = dumps(job.writer.whole(answers))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"server-timing", server_timing(answers[0])),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _collect(self, index: int, stream: AnswerStream) -> Answer:
        async for event in stream:
            if isinstance(event, TextDelta):
                self._stats.deltas[index].append(time.perf_counter())
            elif isinstance(event, Finished):
                return event.answer
        raise AssertionError("a stream ends with its answer or an error")

    async def _stream(self, writer: Writer, streams: Sequence[AnswerStream], send: Send) -> None:
        # Bounded, so that a client that reads slowly is felt by its streams.
        queue: asyncio.Queue[Found] = asyncio.Queue(_WAITING_EVENTS)
        pumps = [asyncio.ensure_future(_pump(i, stream, queue)) for i, stream in enumerate(streams)]
        try:
            await self._send_stream(writer, len(streams), queue, send)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _send_stream(self, writer: Writer, running: int, queue: asyncio.Queue[Found], send: Send) -> None:
        head, failure = writer.begin(), None
        found: Found | None
        started = spoken = False
        now = asyncio.get_running_loop().time
        due = now() + KEEP_ALIVE_SECONDS
        frames: list[bytes] = []
        while running and failure is None:
            try:
                found = await (queue.get() if spoken else asyncio.wait_for(queue.get(), due - now()))
            except TimeoutError:
                found = None
            # All that is there goes out at once: a packet for each token would cost more than the token.
            while found is not None:
                index, event = found
                if isinstance(event, Exception):
                    if not started:
                        raise event
                    failure = event
                    break
                frames.append(self._written(writer, index, event))
                spoken = spoken or bool(frames[-1])
                running -= isinstance(event, Finished)
                found = None if queue.empty() else queue.get_nowait()
            # Tokens that are held back, as those of a call are, keep no connection alive.
            part = b"".join(frames) or (_KEEP_ALIVE if now() >= due and not spoken else b"")
            frames.clear()
            if part:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                await _send_part(send, head + part)
                head, due = b"", now() + KEEP_ALIVE_SECONDS
        last = writer.end() if failure is None else self._failed(writer, failure)
        await _send_part(send, last, more=False)

    def _written(self, writer: Writer, index: int, event: Event) -> bytes:
        if isinstance(event, TextDelta):
            self._stats.deltas[index].append(time.perf_counter())
            return writer.event(index, event)
        if isinstance(event, Finished):
            self._stats.answers.append(event.answer)
            return writer.event(index, event)
        return b""

    def _failed(self, writer: Writer, error: Exception) -> bytes:
        status, message, code, param = (
            500,
            "The server failed on this answer: its log says why.",
            "internal_error",
            None,
        )
        if isinstance(error, OpsinError):
            status, message, code, param = told(error)
        else:
            _LOG.error("an answer failed", exc_info=error)
        self._stats.refused = code
        return writer.failed(error_body(status, message, code, param))


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


async def _send_part(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _pump(index: int, stream: AnswerStream, queue: asyncio.Queue[Found]) -> None:
    try:
        async for event in stream:
            if not isinstance(event, Started):
                await queue.put((index, event))
    except Exception as error:  # noqa: BLE001 - who reads the queue must hear of every end
        await queue.put((index, error))


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
