"""One request to the model, from its arrival to its last byte: what handles it, and what is known of it."""

import asyncio
import contextlib
import functools
import itertools
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsin.core.answer import Answer, Finished, TextDelta, more_fields
from opsin.core.request import Prompt, SamplingParams
from opsin.core.settings import ServerSettings
from opsin.engine.clock import stage_row
from opsin.prompt import PromptBuilder
from opsin.server.errors import BadField, UnknownModel, error_body, explain
from opsin.server.images import FairQueue, RequestImages
from opsin.server.middleware import RateBucket, is_loopback
from opsin.server.schema import Common, dumps, ignored
from opsin.server.stored import StoredResponses
from opsin.worker import AnswerStream, Loaded, NotReady, WorkerEngine, WorkerPool

_LOG = logging.getLogger("opsin.server")
KEEP_ALIVE_SECONDS = 5.0
"""How long nothing may go out before the first text: then a comment does, which keeps proxies from hanging up."""
LAST_WORDS_SECONDS = 3.0
"""How long handlers may take to tell their clients that the time for running answers is over."""
MOST_IGNORED = 20
"""How many fields without effect a request is told of."""
FOLDED = "the chat template takes no such messages: system messages were joined, or tool calls became text"
_UNSEEMLY = re.compile(r"[^\w.\[\]-]", re.ASCII)
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Writer:
    """Writes answers in the shape of one API. Frames are bytes of server-sent events, as many as are due.

    `waiting` is the frame that keeps a connection alive, `ignored` names fields that have no effect on this model.
    """

    waiting = b": the answer is being worked on\n\n"
    ignored: tuple[str, ...] = ()

    def begin(self) -> bytes:
        """Frames before the first event."""
        return b""

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        """Frames for one event of one choice."""
        raise NotImplementedError

    def end(self, answers: Sequence[Answer]) -> bytes:  # noqa: ARG002 - not every API repeats something of them
        """Frames after every choice is finished."""
        return b""

    def failed(self, status: int, body: dict[str, Any]) -> bytes:  # noqa: ARG002 - some APIs tell errors apart by it
        """The frame that tells of an error in the middle of a stream; nothing follows it."""
        return b"data: " + dumps(body) + b"\n\n"

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The whole answer, one element a choice."""
        raise NotImplementedError


Asked = list[tuple[Prompt, SamplingParams]]
"""What the model is asked: a prompt and parameters a choice."""


class CompletionHandler(Response):
    """The response to a request for answers: does everything when it is sent, and undoes it however that ends.

    `prepare` says what the loaded model is asked, and who writes the answer. What goes wrong before the first byte is
    raised, for the error handlers; what goes wrong later becomes an event of the stream. A client that goes away ends
    its answers at once.
    """

    count_only = False

    def __init__(
        self,
        request: Request,
        body: Common,
        prepare: Callable[[Any, "ModelManager", RequestImages], Awaitable[tuple[Asked, Writer]]],
    ) -> None:
        super().__init__()
        self._request, self._body, self._prepare = request, body, prepare
        self._stats: RequestStats = request.state.stats
        self._notes: dict[str, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - the ASGI signature
        """Carry it out, or as much of it as the client stays for."""
        work = asyncio.ensure_future(self._carry_out(send))

        async def leaving() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            work.cancel()

        watch = asyncio.ensure_future(leaving())
        try:
            await work
        except asyncio.CancelledError:
            if not watch.done():
                raise
            self._stats.status, self._stats.refused = 499, "cancelled"
        finally:
            watch.cancel()
            await asyncio.wait([watch])  # nothing listens any more when the next request of the connection comes

    async def _carry_out(self, send: Send) -> None:
        server, stats, key = self._request.app.state, self._stats, self._request.state.key
        # Those who ask at once share alike: by their keys, or where there are none by their addresses.
        who = key or getattr(self._request.client, "host", "")
        model: ModelManager = server.model
        with contextlib.ExitStack() as held:
            loaded = model.engine.loaded
            sizes = loaded.limits.images if loaded else None
            images = RequestImages(server.images, who, sizes, count_only=self.count_only)
            held.callback(images.hold, 0)
            model.enter()
            stats.model = model.name
            model.engine.wake(low=self.count_only or server.priority < 0)  # it loads while images are decoded
            model.check(self._body.model)
            self._note_ignored(ignored(self._body), strict=model.settings.strict_fields)
            asked, writer = await self._prepare(self._body, model, images)
            self._note_ignored(writer.ignored, strict=model.settings.strict_fields)
            if any(prompt.folded for prompt, _ in asked):
                self._notes["Opsin-Notes"] = FOLDED
            stats.images = len({image.sha256 for prompt, _ in asked for image in prompt.images})
            await self._ask(asked, writer, images, held, send=send)

    async def _ask(
        self, asked: Asked, writer: Writer, images: RequestImages, held: contextlib.ExitStack, *, send: Send
    ) -> None:
        """Ask the model when it is the request's turn, and send what it answers; `held` is undone at the end."""
        server, stats, key = self._request.app.state, self._stats, self._request.state.key
        queue: FairQueue = server.queue
        bucket: RateBucket = self._request.state.bucket
        stats.streamed = bool(self._body.stream)
        count, max_seconds, began = len(asked), asked[0][1].max_seconds, time.perf_counter()
        held.enter_context(bucket.counted(count - 1))
        # When the time is over it goes on without room: the engine ends it at once, and says why.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max_seconds):
                await queue.take(images.key, count)
                held.callback(queue.leave, count)
        waited = time.perf_counter() - began
        # The time spent waiting counts towards the limit.
        left = {} if max_seconds is None else {"max_seconds": max(max_seconds - waited, 1e-3)}
        same = {"waited_since": stats.began, "queue_ms": waited * 1e3, "salt": key, "priority": server.priority}
        streams: list[AnswerStream] = []
        for prompt, params in asked:
            stream = server.model.engine.submit(prompt, params.model_copy(update=left), **same)
            held.callback(stream.cancel)  # without effect on one that has ended
            streams.append(stream)
            stats.deltas.append([])
        del prompt
        asked.clear()  # the pixels belong to the engine now, which frees them as soon as it can
        answers = _Answers(streams, images, stats)
        await (self._stream if stats.streamed else self._whole)(writer, answers, send)

    def _note_ignored(self, found: Iterable[str], *, strict: bool) -> None:
        """Name the request's fields without effect, in the log and in a header. Raises BadField."""
        names = [_UNSEEMLY.sub("?", name)[:64] for name in itertools.islice(found, MOST_IGNORED)]
        if not names:
            return
        if strict:
            raise BadField(
                f"The field {names[0]!r} has no effect here: leave it out (--strict-fields is on).", names[0]
            )
        _LOG.info("fields without effect: %s", ", ".join(names))
        self._notes["Opsin-Ignored"] = ", ".join(filter(None, (self._notes.get("Opsin-Ignored"), *names)))

    async def _whole(self, writer: Writer, answers: "_Answers", send: Send) -> None:
        while answers.running:
            await answers.take()
        whole = answers.in_order()
        # The stages for a browser's tools, in milliseconds.
        stages = stage_row(whole[0].stages).items()
        timing = ", ".join(f"{name.removesuffix('_ms')};dur={ms}" for name, ms in stages if ms)
        headers = {"Server-Timing": timing, **self._notes}
        response = Response(dumps(writer.whole(whole)), headers=headers, media_type="application/json")
        await response(self._request.scope, self._request.receive, send)

    async def _stream(self, writer: Writer, answers: "_Answers", send: Send) -> None:
        head, started = writer.begin(), False
        spoken = False  # tokens that are held back, as those of a call are, keep no connection alive
        now = asyncio.get_running_loop().time
        due = now() + KEEP_ALIVE_SECONDS
        try:
            while answers.running:
                # All that is there goes out at once: a packet for each token would cost more than the token.
                found = await answers.take(None if spoken else due - now())
                part = b"".join([writer.event(index, event) for index, event in found])
                spoken = spoken or bool(part)
                if not spoken and now() >= due:
                    part = writer.waiting
                if part:
                    if not started:
                        notes = [(name.lower().encode(), value.encode()) for name, value in self._notes.items()]
                        headers = [*_STREAM_HEADERS, *notes]
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                        started = True
                    await send({"type": "http.response.body", "body": head + part, "more_body": True})
                    head, due = b"", now() + KEEP_ALIVE_SECONDS
            last = writer.end(answers.in_order())
        except Exception as error:
            if not started:
                raise
            told = explain(error)
            body = error_body(*told)
            self._stats.refused = body["error"]["code"]
            last = writer.failed(told[0], body)
        await send({"type": "http.response.body", "body": last})


class _Answers:
    """The streams of one request, read together. The images' share of memory is given back once all have begun."""

    def __init__(self, streams: Sequence[AnswerStream], images: RequestImages, stats: "RequestStats") -> None:
        self.running = len(streams)
        self._finished: dict[int, Answer] = {}
        self._streams = streams
        self._silent = set(range(len(streams)))
        self._images, self._stats = images, stats
        self._ready = asyncio.Event()
        for stream in streams:
            stream.read_with(asyncio.get_running_loop(), self._ready)

    def in_order(self) -> list[Answer]:
        """The answers, once none is running."""
        return [self._finished[index] for index in range(len(self._streams))]

    async def take(self, seconds: float | None = None) -> list[tuple[int, TextDelta | Finished]]:
        """Everything that has come, by stream; nothing when nothing comes in time. Raises a stream's error."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ready.wait()
        self._ready.clear()
        found: list[tuple[int, TextDelta | Finished]] = []
        for index, stream in enumerate(self._streams):
            events, error = stream.take()
            shown = [(index, event) for event in events if isinstance(event, (TextDelta, Finished))]
            for _, event in shown:
                if isinstance(event, Finished):
                    self.running -= 1
                    self._finished[index] = event.answer
                    self._stats.answers.append(event.answer)
                else:
                    self._stats.deltas[index].append(time.perf_counter())
            if error is not None and not shown:
                raise error
            if error is not None:
                self._ready.set()  # first what came before it
            if shown and self._silent:
                self._silent.discard(index)
                if not self._silent:
                    self._images.hold(0)
            found += shown
        return found


def extensions(answer: Answer) -> dict[str, Any]:
    """What Opsin adds to OpenAI's fields: llama-server's timings, stages, images, the guard, what cut it, boxes."""
    return {
        "timings": asdict(answer.timings),
        "stages": stage_row(answer.stages),
        "images": [asdict(image) for image in answer.images],
        "guard": None if answer.guard is None else asdict(answer.guard),
        "limit": answer.limit,
        **more_fields(answer),
    }


@dataclass(slots=True)
class RequestStats:
    """Filled in while the request runs. Times are `time.perf_counter()`; `began_at` is Unix time.

    `refused` is the error code when there was no complete answer.
    `deltas` holds the times at which pieces of text went out, one list per choice.
    """

    route: str
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


Watcher = Callable[[RequestStats], object]
"""Told about each request once, when it has ended. Must be quick and never raise."""


_prompts_of = functools.lru_cache(maxsize=1)(PromptBuilder)


class ModelManager:
    """The one model of a server; used on its event loop alone.

    The task of a handler enters before it asks the model, and ends when its answer is complete: a drain waits for
    whoever has entered and lets nobody in. `slots` are those of all workers (default: of one).
    """

    def __init__(
        self, settings: ServerSettings, engine: WorkerEngine | WorkerPool, *, slots: int | None = None
    ) -> None:
        self.settings = settings
        self.slots = slots or settings.parallel
        self.engine = engine
        self.stored = StoredResponses()
        self._draining = self.warming = False
        self._entered: set[asyncio.Task[Any]] = set()

    @property
    def state(self) -> str:
        """The engine's state, or `draining`; `warming` while the server itself is (its owner sets that)."""
        state = "draining" if self._draining else self.engine.state
        return "warming" if self.warming and state == "ready" else state

    @property
    def ready(self) -> bool:
        """Whether requests are answered; an unloaded model is loaded again by the next one."""
        return self.state in {"ready", "unloaded", "reloading"}

    @property
    def facts(self) -> Loaded:
        """What is known of the model, also while it is unloaded.

        This and the next two raise NotReady before it was loaded for the first time, and when it cannot be used.
        """
        facts = self.engine.loaded
        if facts is None or self.engine.state == "failed":
            raise NotReady("The model is being loaded: ask again in a moment (GET /ready says when).")
        return facts

    @property
    def name(self) -> str:
        """What the model is called here."""
        return self.settings.served_name or Path(self.facts.info.llm_file).stem

    @property
    def prompts(self) -> PromptBuilder:
        """What writes prompts for the model. Raises ModelUnreadable if its template cannot be used."""
        return _prompts_of(self.facts.source)

    def check(self, name: str | None) -> None:
        """Raise UnknownModel if only the served name is accepted: with strict_model, and away from loopback."""
        any_will_do = is_loopback(self.settings.host) and not self.settings.strict_model
        if name not in {None, self.name} and not any_will_do:
            raise UnknownModel(str(name), self.name)

    def enter(self) -> None:
        """Let the running task in, which asks the model and ends with its answer. Raises NotReady in a drain."""
        if self._draining:
            raise NotReady("The server is about to end and takes no new requests: ask again in a moment.")
        task = asyncio.current_task()
        assert task is not None
        self._entered.add(task)
        task.add_done_callback(self._entered.discard)

    async def drain(self, seconds: float) -> None:
        """Let nobody in, wait for running answers, then end what still runs."""
        self._draining = True
        if self._entered:
            await asyncio.wait(self._entered, timeout=seconds)
        late = self._entered.copy()
        if late:
            _LOG.warning("%d answers still ran after %g s and are cut off", len(late), seconds)
        await asyncio.to_thread(self.engine.close)
        if late:
            await asyncio.wait(late, timeout=LAST_WORDS_SECONDS)


class StatsMiddleware:
    """Keeps the stats of each request to the API, also of those that no handler sees, and tells the watchers."""

    def __init__(self, app: ASGIApp, watchers: Sequence[Watcher], paths: set[str], root_path: str = "") -> None:
        self._app, self._watchers, self._paths, self._root = app, watchers, paths, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and tell the watchers when its last byte is out."""
        if scope["type"] == "http":
            if self._root and scope["path"] == self._root:  # where the page's relative addresses would lead elsewhere
                await RedirectResponse(f"{self._root}/")(scope, receive, send)
                return
            path = scope["path"]
            if path.startswith(f"{self._root}/"):  # some proxies cut it off, others leave it
                path = path[len(self._root) :]
            scope = {**scope, "path": path.rstrip("/") or "/"}
            # The HTTP server itself leaves out the body of what answers to HEAD.
            scope["method"] = "GET" if scope["method"] == "HEAD" else scope["method"]
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        # Any text may stand in a path, also one that would be a line of the log.
        parent = dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1") or None
        stats = RequestStats(scope["path"] if scope["path"] in self._paths else "other", traceparent=parent)
        scope.setdefault("state", {})["stats"] = stats

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                stats.status = message["status"]
                names = (b"x-request-id", b"request-id")  # OpenAI's and Anthropic's
                message.setdefault("headers", []).extend((name, stats.id.encode()) for name in names)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            stats.status, stats.refused = 500, "internal_error"
            raise
        finally:
            stats.ended = time.perf_counter()
            for watch in self._watchers:
                watch(stats)
