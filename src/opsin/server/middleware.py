"""What stands before every request: a patient connection, who may ask from where, and what a request may cost."""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import unquote

import h11
import httpx
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from opsin.core.errors import BadParameter
from opsin.core.settings import ServerSettings
from opsin.images.fetch import WEB_PORTS
from opsin.server.errors import ErrorResponse

_LOG = logging.getLogger("opsin.server")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_NAME = re.compile(r"[a-z0-9_.-]+|[0-9a-f:.]+")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/]*)(.*)")
OPEN_PATHS = frozenset(("/", "/health", "/ready", "/favicon.ico"))
"""What needs no key; the page's own files below /page/ need none either."""
MAX_KEYS = 10_000
"""Keys of all objects in a body together."""
MAX_ELEMENTS = 50_000
"""Elements of all arrays and objects in a body together."""
LEAST_BYTES_PER_SECOND = 8 * 1024
UNFINISHED_BODIES = 4
"""The bytes of all unfinished bodies together, as a multiple of what one body may have."""
SMALL_BODY = 2**20
"""A body of up to this many bytes is read even if the others take up all of that."""
MOST_CONNECTIONS = 512
"""Half of the files that Linux lets a process open; the rest is for images and the model."""
FIRST_BYTE_SECONDS = 10.0


class Connection(H11Protocol):
    """uvicorn's connection with three limits more, and with what HTTP asks for and h11 lacks.

    A head that takes longer than `patience` seconds ends the connection, as does a client that takes nothing of its
    answer for so long; the answer then ends as after any hang-up. Before its first request an idle connection ends
    after ten seconds, after one at most `patience` behind uvicorn's keep-alive time, also when the end of the answer
    lies unread. Of too many connections the idle one that would end next goes at once.
    """

    patience: float
    _in_head = _ends = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        """Wait for the first request."""
        super().connection_made(transport)
        self._end_in(min(FIRST_BYTE_SECONDS, self.timeout_keep_alive))
        if len(self.connections) > MOST_CONNECTIONS:
            connections = cast("set[Connection]", self.connections)
            min(connections, key=lambda one: one.idle_until).transport.abort()

    @property
    def idle_until(self) -> float:
        """When it ends unless a request comes, by the loop's clock; one that is answered or ending has no such time."""
        if self._timer is None or self._answering() or self.transport.is_closing():
            return math.inf
        return self._timer.when()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head."""
        super().data_received(data)
        if self._answering():
            if not self.flow.write_paused:
                self._end_in(None)  # it takes the time it takes, while it is read
        elif not self._in_head:
            self._in_head = True
            self._end_in(self.patience)

    def handle_events(self) -> None:
        """Read what has come; of a new request's head, what h11 leaves open (RFC 9112, 3.2.2 and 6.3)."""
        before = self.cycle
        super().handle_events()
        if self.cycle is before:
            return
        # Its application has not begun yet, so the head can still be changed.
        if found := _ABSOLUTE.fullmatch(self.scope["raw_path"]):
            self.scope["raw_path"] = path = found[2] or b"/"
            self.scope["path"] = unquote(path.decode("ascii"))
            self.headers[:] = [(b"host", found[1]), *(pair for pair in self.headers if pair[0] != b"host")]
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in self.headers}:
            self.headers.append((b"connection", b"close"))  # as if the client had asked for it

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed head as all errors are; where an answer has begun already, only end the connection."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            answer = ErrorResponse(400, msg.replace(" received.", ": send HTTP/1.1."), "bad_request")
            head = h11.Response(status_code=400, headers=[*answer.raw_headers, (b"connection", b"close")])
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True
        self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override] # asyncio asks whether to stay open
        """Stay open for the answer: the client may have closed its sending side alone."""
        self._ends = self._answering() and not self.cycle.more_body
        self._ask_for_life()
        return self._ends

    def _ask_for_life(self) -> None:
        """Say "go on" to a client until the answer begins: the second time that fails if it is gone."""
        waits = self._answering() and not self.cycle.response_started
        if self._ends and waits and not self.transport.is_closing():
            if self.scope["http_version"] == "1.1":  # others know no such answers
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.loop.call_later(0.1, self._ask_for_life)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if not self._answering():
            self._in_head = bool(self.conn.trailing_data[0])
            self._end_in(self.patience + (0 if self._in_head else self.timeout_keep_alive))
            if self._ends:
                self.transport.close()

    def pause_writing(self) -> None:
        """The client reads slower than is written."""
        super().pause_writing()
        self._end_in(self.patience)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._answering():
            self._end_in(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        super().connection_lost(exc)
        self._end_in(None)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end_in(self, seconds: float | None) -> None:
        """End the connection then, unless this is called again; None: wait as long as it takes."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._end)

    def _end(self) -> None:
        if self.flow.write_paused:
            _LOG.warning("an answer was ended: its client read nothing for %g s", self.patience)
        self.transport.abort()


class SecurityMiddleware:
    """Lets a request in, or answers it with OpenAI's error body, before the body is read.

    Refused are Host names that are not the server's (421: a page elsewhere may have pointed its name here), web pages
    of other origins than the server's own and `cors_origins` (403), and requests without one of `keys`, if there are
    any (401). `scope["state"]["key"]` becomes the label of the key: the first 16 hex digits of its SHA-256, empty
    without keys. Raises BadParameter for settings that name something that is not a host or origin.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, keys: tuple[str, ...] = ()) -> None:
        self._app = app
        self._names = {"localhost", *map(read_host, (*settings.allowed_hosts, settings.host))}
        self._origins = set(map(read_origin, settings.cors_origins))
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        # A browser asks for leave (OPTIONS) without the key; the answer only says which origins are let in.
        self._cors = CORSMiddleware(
            self._let_in,
            allow_origins=self._origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("Opsin-Ignored", "Opsin-Notes", "Retry-After", "Server-Timing", "X-Request-Id"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through, or refuse."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = ""
        headers = Headers(scope=scope)
        answer = self._wrong_host(scope, headers) or self._wrong_origin(scope, headers)
        await (answer or self._cors)(scope, receive, send)

    def _wrong_host(self, scope: Scope, headers: Headers) -> ErrorResponse | None:
        if scope.get("http_version", "1.1") not in {"1.0", "1.1"}:
            return ErrorResponse(505, "Only HTTP/1.1 and 1.0 are spoken here: use one.", "wrong_version")
        name, _ = parse_host(headers.get("host", ""))
        # The address that was connected to, written as an address: no name was turned to lead here.
        local = (scope.get("server") or ("",))[0].removeprefix("::ffff:")
        if name and (name in self._names or is_loopback(name) or name == local):
            return None
        message = "The Host header does not name this server: use its address, or start it with --allowed-hosts NAME."
        return ErrorResponse(421, message, "wrong_host")

    def _wrong_origin(self, scope: Scope, headers: Headers) -> ErrorResponse | None:
        """Refuse what a page elsewhere sends. What it only reads, the browser keeps from it."""
        origin, host = headers.get("origin"), headers["host"]
        if origin is None or scope["method"] in {"GET", "HEAD"}:
            return None
        # Its own page; TLS may end at a proxy, so either scheme will do.
        if origin in {f"http://{host}", f"https://{host}", *self._origins}:
            return None
        message = "Web pages from elsewhere may not use this server: start it with --cors-origins ORIGIN to allow one."
        return ErrorResponse(403, message, "wrong_origin")

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what has a key, or needs none."""
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":  # as Anthropic's and Azure's clients send it
            key = headers.get("x-api-key") or headers.get("api-key", "")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # All are compared, so that the time does not tell which one matched, nor how far.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        app = self._app
        if any(matches):
            scope["state"]["key"] = digest.hex()[:16]
        elif self._digests and scope["path"] not in OPEN_PATHS and not scope["path"].startswith("/page/"):
            message = "An API key of this server is needed: send it as Authorization: Bearer KEY, or as x-api-key: KEY."
            app = ErrorResponse(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await app(scope, receive, send)


def read_host(host: str) -> str:
    """The name in a setting, as a Host header has it. Raises BadParameter."""
    name, _ = parse_host(f"[{host}]" if ":" in host and not host.startswith("[") else host)
    if not name:
        raise BadParameter(f"{host!r} is not a host name or address: write it without scheme and port, as example.org.")
    return name


def read_origin(origin: str) -> str:
    """The origin in a setting. Raises BadParameter."""
    scheme, _, host = origin.partition("://")
    name, port = parse_host(host.partition("/")[0].lower())
    if not _SCHEME.fullmatch(scheme) or not name or host not in {name, f"{name}:{port}"}:
        likely = f"{scheme.lower()}://{name}" + (f":{port}" if port else "") if name else "https://example.org"
        raise BadParameter(f"{origin!r} is not an origin: write {likely}, in lower case and without a path.")
    return origin


def parse_host(text: str) -> tuple[str, int | None]:
    """The name or address in `name:port`, in lower case and without its last dot, and the port if there is one.

    As in a Host header: IPv6 addresses stand in brackets. The name is empty if the text is malformed.
    """
    try:
        url = httpx.URL(f"ftp://{text}")  # a scheme whose usual port nobody means
    except httpx.InvalidURL:
        return "", None
    name = url.raw_host.decode("ascii").lower().rstrip(".")
    if not _NAME.fullmatch(name) or any(sign in text for sign in "/?#@"):
        return "", None
    return name, url.port


def image_host(host: str) -> list[tuple[str, int]]:
    """The name and the ports of an entry of --image-hosts. Raises BadParameter."""
    name, port = parse_host(host.removeprefix("*."))
    if not name:
        raise BadParameter(
            f"{host!r} is not a host that images can be fetched from: write example.org, example.org:8443 "
            "or *.example.org."
        )
    star = "*." if host.startswith("*.") else ""
    return [(star + name, one) for one in (WEB_PORTS if port is None else (port,))]


def is_loopback(name: str) -> bool:
    """Whether a host, written as a name or an address, can only be this machine."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


@dataclass(slots=True)
class RateBucket:
    """What one key has left: requests that it may make now, as of `at` seconds, and those that are running.

    A request counts once for each of its choices (`n`).
    """

    tokens: float
    at: float
    running: int = 0

    @contextlib.contextmanager
    def counted(self, n: int) -> Iterator[None]:
        """Around `n` requests while they run."""
        self.tokens -= n
        self.running += n
        try:
            yield
        finally:
            self.running -= n


class Limits:
    """Middleware around the API's `routes`: checks and reads the body, then counts the request.

    Refused are bodies that are not plain JSON (415), too large (413), too slow (408), or too many at once (503), and
    what is over the limits of a key (429). A key may make `requests_per_minute` at once and gets them back evenly over
    each minute; at most `concurrent_requests` run at the same time. Without keys all clients share one bucket. A
    request is counted once its body is complete; `scope["state"]["bucket"]` is for its further choices. `clock` gives
    seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        routes: Sequence[BaseRoute],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._routes, self._clock = app, routes, clock
        self._rate, self._concurrent = settings.requests_per_minute, settings.concurrent_requests
        self._max_body, self._patience = settings.max_body_bytes, settings.slow_reader_seconds
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
        found = self._wrong_headers(Headers(scope=scope)) or self._over(key) or await self._read(receive)
        if isinstance(found, bytes):
            found = wrong_json(found) or self._over(key) or found  # again: the body may have taken its time
        if isinstance(found, ErrorResponse):
            await found(scope, receive, send)
            return
        pieces = [found]

        async def replayed() -> Message:
            """The body in one piece, and then whatever else comes."""
            if pieces:
                return {"type": "http.request", "body": pieces.pop(), "more_body": False}
            return await receive()

        bucket = state["bucket"] = self._buckets[key]
        with bucket.counted(1):
            await self._app(scope, replayed, send)

    def _wrong_headers(self, headers: Headers) -> ErrorResponse | None:
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return ErrorResponse(415, "Send JSON, with Content-Type: application/json.", "wrong_content_type")
        if headers.get("content-encoding", "identity").lower() != "identity":
            return ErrorResponse(415, "Compressed bodies are not read: leave Content-Encoding out.", "wrong_encoding")
        # uvicorn has seen that it is a number.
        return self._too_large() if int(headers.get("content-length", "0")) > self._max_body else None

    async def _read(self, receive: Receive) -> bytes | ErrorResponse:
        body, more, began = bytearray(), True, self._clock()
        try:
            while more:
                left = began + self._patience + len(body) / LEAST_BYTES_PER_SECOND - self._clock()
                if left <= 0:
                    raise TimeoutError  # noqa: TRY301 - whichever limit it is, the answer is the same
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
            return ErrorResponse(408, "The body came too slowly: send it whole, and faster.", "timeout")
        finally:
            self._unfinished -= len(body)
        return bytes(body)

    def _too_large(self) -> ErrorResponse:
        message = f"The request is larger than {self._max_body:,} bytes, the limit: send fewer or smaller images."
        return ErrorResponse(413, message, "too_large")

    def _over(self, key: str) -> ErrorResponse | None:
        now = self._clock()
        bucket = self._buckets.setdefault(key, RateBucket(float(self._rate or 0), now))
        if self._rate is not None:
            bucket.tokens = min(self._rate, bucket.tokens + (now - bucket.at) * self._rate / 60)
        bucket.at = now
        if self._concurrent is not None and bucket.running >= self._concurrent:
            seconds = 1
            message = f"This key has {self._concurrent} requests running, the limit: wait until one has ended."
        elif self._rate is not None and bucket.tokens < 1:
            seconds = math.ceil((1 - bucket.tokens) * 60 / self._rate)
            message = f"This key may make {self._rate} requests a minute: try again in {seconds} s."
        else:
            return None
        return ErrorResponse(429, message, "rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def wrong_json(body: bytes) -> ErrorResponse | None:
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
