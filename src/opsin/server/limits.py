"""What one request and one API key may take: bytes and size of a body, requests per minute and at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsin.core.server_settings import ServerSettings
from opsin.server.errors import ErrorResponse
from opsin.server.fair_queue import FairQueue
from opsin.server.handler import Job
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
        self._counted = 1
        self._room = 0

    async def admit(self, job: Job) -> Job:
        """Wait until it is the key's turn. The time spent waiting counts towards the job's `max_seconds`.

        Raises QueueFull.
        """
        n, seconds = len(job.asked), job.asked[0][1].max_seconds
        self._bucket.tokens -= n - 1
        self._bucket.running += n - 1
        self._counted = n
        began = time.perf_counter()
        # When the time is over it goes on without room: the engine ends it at once, and says why.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._queue.take(self._key, n)
                self._room = n
        waited = time.perf_counter() - began
        asked = job.asked
        if seconds is not None:
            left = {"max_seconds": max(seconds - waited, 1e-3)}
            asked = [(prompt, params.model_copy(update=left)) for prompt, params in asked]
        return dataclasses.replace(job, asked=asked, queue_ms=waited * 1e3)

    def release(self) -> None:
        """The request has ended."""
        self._bucket.running -= self._counted
        if self._room:
            self._queue.leave(self._room)


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
        bucket = self._bucket(key)
        found = self._wrong_headers(Headers(scope=scope)) or self._over(bucket) or await self._read(receive)
        if isinstance(found, bytes):
            found = _wrong_json(found) or self._over(self._bucket(key)) or found
        if isinstance(found, ErrorResponse):
            await found(scope, receive, send)
            return
        bucket.running += 1
        bucket.tokens -= 1
        admission = state["admission"] = Admission(key, bucket, self._queue)
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
        pieces: list[bytes] = []
        size, more, began = 0, True, self._clock()
        slow = ErrorResponse(408, "The body came too slowly: send it whole, and faster.", "timeout")
        try:
            while more:
                left = began + self._patience + size / LEAST_BYTES_PER_SECOND - self._clock()
                if left <= 0:
                    return slow
                async with asyncio.timeout(min(self._patience, left)):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    return ErrorResponse(499, "The client left before its body was complete.", "cancelled")
                pieces.append(message.get("body", b""))
                more = message.get("more_body", False)
                size += len(pieces[-1])
                self._unfinished += len(pieces[-1])
                if size > self._max_body:
                    return self._too_large()
                if size > SMALL_BODY and self._unfinished > UNFINISHED_BODIES * self._max_body:
                    return ErrorResponse(
                        503, "Too many large bodies arrive at once: try again.", "busy", headers={"Retry-After": "1"}
                    )
        except TimeoutError:
            return slow
        finally:
            self._unfinished -= size
        return b"".join(pieces)

    def _too_large(self) -> ErrorResponse:
        return ErrorResponse(
            413,
            f"The request is larger than {self._max_body:,} bytes, the limit: send fewer or smaller images.",
            "too_large",
        )

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
