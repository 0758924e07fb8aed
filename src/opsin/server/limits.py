"""What one request and one API key may take: a body's bytes, requests per minute, and room in the engine in turn."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsin.core.errors import QueueFull
from opsin.core.settings import ServerSettings
from opsin.server.errors import ErrorResponse
from opsin.server.pixels import holding_pixels

MAX_KEYS = 10_000
"""Keys of all objects in a body together."""
MAX_ELEMENTS = 50_000
"""Elements of all arrays and objects in a body together."""
LEAST_BYTES_PER_SECOND = 8 * 1024
UNFINISHED_BODIES = 4
"""The bytes of all unfinished bodies together, as a multiple of what one body may have."""
SMALL_BODY = 2**20
"""A body of up to this many bytes is read even if the others take up all of that."""


@dataclass(slots=True, eq=False)
class _Waiter:
    n: int
    granted: asyncio.Future[None]


class FairQueue:
    """Lets `parallel` answers run and as many wait in the engine; the others wait here, each key in a line of its own.

    Keys take turns, whatever they ask for. At most `max_queue` answers wait, here and in the engine together. If there
    are more, the newest request of the key with the most waiting answers is refused, so that a key that asks for much
    takes no place from a key that asks for little. Used on one event loop.
    """

    def __init__(self, parallel: int, max_queue: int) -> None:
        ahead = min(parallel, max_queue)
        self._room = parallel + ahead
        self._longest = max_queue - ahead
        self._used = 0
        self._lines: dict[str, deque[_Waiter]] = {}

    @property
    def waiting(self) -> int:
        """Answers that wait here."""
        return sum(map(self._length, self._lines))

    async def take(self, key: str, n: int) -> None:
        """Wait for room for `n` answers, to be given back with `leave`. Raises QueueFull."""
        waiter = _Waiter(n, asyncio.get_running_loop().create_future())
        self._lines.setdefault(key, deque()).append(waiter)
        self._serve()
        if self.waiting > self._longest:
            longest = max(self._lines, key=lambda one: (self._length(one), one == key))
            refused = self._lines[longest][-1]
            self._drop(longest, refused)
            if not refused.granted.done():
                refused.granted.set_exception(QueueFull("Too many requests wait already: try again in a moment."))
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled():
                self._drop(key, waiter)
                self._serve()
            elif waiter.granted.exception() is None:
                self.leave(n)
            raise

    def leave(self, n: int) -> None:
        """Give room for `n` answers back."""
        self._used -= n
        self._serve()

    def _length(self, key: str) -> int:
        return sum(waiter.n for waiter in self._lines[key])

    def _drop(self, key: str, waiter: _Waiter) -> None:
        line = self._lines.get(key, deque())
        if waiter in line:
            line.remove(waiter)
        if not line:
            self._lines.pop(key, None)

    def _serve(self) -> None:
        """Grant room to the keys in turn, as long as it suffices for the key whose turn it is."""
        while self._lines:
            key, line = next(iter(self._lines.items()))
            waiter = line[0]
            # A request for more than the whole room runs alone.
            if self._used and self._used + waiter.n > self._room:
                return
            del self._lines[key]
            line.popleft()
            if line:
                self._lines[key] = line  # at the end of the turn order
            if not waiter.granted.done():  # it is done if its request was cancelled just now
                self._used += waiter.n
                waiter.granted.set_result(None)


@dataclass(slots=True)
class RateBucket:
    """What one key has left: requests that it may make now, as of `at` seconds, and the choices that are running."""

    tokens: float
    at: float
    running: int = 0


class Admission:
    """One request's claim on its key's rate and on the engine's room; a request counts once for each choice (`n`)."""

    def __init__(self, key: str, bucket: RateBucket, queue: FairQueue) -> None:
        self._key = key
        self._bucket = bucket
        self._queue = queue
        self._room = 0
        self._counted = 0
        self._count(1)

    async def admit(self, n: int, max_seconds: float | None) -> float:
        """Wait until it is the key's turn for `n` answers; return the seconds waited. Raises QueueFull."""
        self._count(n - 1)
        began = time.perf_counter()
        # When the time is over it goes on without room: the engine ends it at once, and says why.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max_seconds):
                await self._queue.take(self._key, n)
                self._room = n
        return time.perf_counter() - began

    def release(self) -> None:
        """The request has ended."""
        self._bucket.running -= self._counted
        if self._room:
            self._queue.leave(self._room)

    def _count(self, n: int) -> None:
        self._counted += n
        self._bucket.tokens -= n
        self._bucket.running += n


class Limits:
    """Middleware around the API's `routes`: checks and reads the body, then counts the request.

    Refused are bodies that are not plain JSON (415), too large (413), too slow (408), or too many at once (503), and
    what is over the limits of a key (429). A key may make `requests_per_minute` at once and gets them back evenly over
    each minute; at most `concurrent_requests` run at the same time. Without keys all clients share one bucket. A
    request is counted once its body is complete. `clock` gives seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        routes: Sequence[BaseRoute],
        queue: FairQueue,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._routes = routes
        self._queue = queue
        self._clock = clock
        self._rate = settings.requests_per_minute
        self._concurrent = settings.concurrent_requests
        self._max_body = settings.max_body_bytes
        self._patience = settings.slow_reader_seconds
        self._unfinished = 0
        self._buckets: dict[str, RateBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        # The routes themselves are asked, so that no spelling of a path leads past the limits.
        if scope["type"] != "http" or all(route.matches(scope)[0] is not Match.FULL for route in self._routes):
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        key = state.get("key", "")
        found = self._wrong_headers(Headers(scope=scope)) or self._over(self._bucket(key)) or await self._read(receive)
        if isinstance(found, bytes):
            found = _wrong_json(found) or self._over(self._bucket(key)) or found
        if isinstance(found, ErrorResponse):
            await found(scope, receive, send)
            return
        admission = state["admission"] = Admission(key, self._bucket(key), self._queue)
        try:
            with holding_pixels():
                await self._app(scope, _replayed(found, receive), send)
        finally:
            admission.release()

    def _wrong_headers(self, headers: Headers) -> ErrorResponse | None:
        kinds = headers.getlist("content-type")
        if len(kinds) != 1 or kinds[0].partition(";")[0].strip().lower() != "application/json":
            return ErrorResponse(415, "Send JSON, with Content-Type: application/json.", "wrong_content_type")
        if headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            return ErrorResponse(415, "Compressed bodies are not read: leave Content-Encoding out.", "wrong_encoding")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return ErrorResponse(400, "The Content-Length header is not a number of bytes: correct it.", "bad_request")
        # The text first: int() is slow for very long numbers.
        return self._too_large() if len(length) > 18 or int(length) > self._max_body else None

    async def _read(self, receive: Receive) -> bytes | ErrorResponse:
        """The whole body."""
        body, more, began = bytearray(), True, self._clock()
        slow = ErrorResponse(408, "The body came too slowly: send it whole, and faster.", "timeout")
        try:
            while more:
                left = began + self._patience + len(body) / LEAST_BYTES_PER_SECOND - self._clock()
                if left <= 0:
                    return slow
                async with asyncio.timeout(min(self._patience, left)):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    return ErrorResponse(499, "The client left before its body was complete.", "cancelled")
                piece, more = message.get("body", b""), message.get("more_body", False)
                body += piece
                self._unfinished += len(piece)
                if len(body) > self._max_body:
                    return self._too_large()
                if len(body) > SMALL_BODY and self._unfinished > UNFINISHED_BODIES * self._max_body:
                    wait = {"Retry-After": "1"}
                    return ErrorResponse(503, "Too many large bodies arrive at once: try again.", "busy", headers=wait)
        except TimeoutError:
            return slow
        finally:
            self._unfinished -= len(body)
        return bytes(body)

    def _too_large(self) -> ErrorResponse:
        message = f"The request is larger than {self._max_body:,} bytes, the limit: send fewer or smaller images."
        return ErrorResponse(413, message, "too_large")

    def _bucket(self, key: str) -> RateBucket:
        """A key's bucket, filled up to now."""
        now = self._clock()
        bucket = self._buckets.setdefault(key, RateBucket(float(self._rate or 0), now))
        if self._rate is not None:
            bucket.tokens = min(self._rate, bucket.tokens + (now - bucket.at) * self._rate / 60)
        bucket.at = now
        return bucket

    def _over(self, bucket: RateBucket) -> ErrorResponse | None:
        if self._concurrent is not None and bucket.running >= self._concurrent:
            seconds = 1
            message = f"This key has {self._concurrent} requests running, the limit: wait until one has ended."
        elif self._rate is not None and bucket.tokens < 1:
            seconds = math.ceil((1 - bucket.tokens) * 60 / self._rate)
            message = f"This key may make {self._rate} requests a minute: try again in {seconds} s."
        else:
            return None
        return ErrorResponse(429, message, "rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def _wrong_json(body: bytes) -> ErrorResponse | None:
    """Refuse bodies whose reading would hold up the event loop: many elements cost far more than many bytes."""
    if b"\0" in body:
        return ErrorResponse(400, "The body is not JSON in UTF-8: send it in UTF-8.", "bad_parameter")
    if not _has_many(body):
        return None
    # Signs inside strings do not count. This cuts out the strings of valid JSON; where the body is not valid, the
    # parser ends before the two disagree.
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') <= 4 * (MAX_KEYS + MAX_ELEMENTS) and not _has_many(b"".join(bare.split(b'"')[::2])):
        return None
    message = f"The body has more than {MAX_KEYS:,} keys or {MAX_ELEMENTS:,} elements, the limits: send a shorter one."
    return ErrorResponse(400, message, "bad_parameter")


def _has_many(body: bytes) -> bool:
    return body.count(b":") > MAX_KEYS or body.count(b",") > MAX_ELEMENTS


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body in one piece, and then whatever else comes."""
    pieces = [body]

    async def replay() -> Message:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(), "more_body": False}
        return await receive()

    return replay
