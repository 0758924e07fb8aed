"""The doors: who may speak to the server, from which web pages, and how large what they say may be.

Each check stands before the body is read. Answers pass through untouched, so streams stay streams.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import SplitResult, urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsin.core.errors import BadParameter
from opsin.core.server_settings import ServerSettings
from opsin.server.errors import ErrorResponse, error_response

KEY_VARIABLE = "OPSIN_API_KEY"
OPEN_PATHS = frozenset(("/", "/health", "/ready", "/favicon.ico"))
"""What needs no key; the page's own files below /page/ neither."""

_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))
_LABEL_DIGITS = 16
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Doors:
    """Middleware that lets a request in, or answers it with OpenAI's error body.

    Refused are: Host names that are not the server's (421: a page elsewhere may have pointed its name here), web pages
    of other origins than the server's own and `cors_origins` (403), requests without one of `keys` where there are any
    (401), bodies that are not JSON (415), too large (413) or never end (408). `scope["state"]["key"]` becomes the label
    of the key: the first 16 hex digits of its SHA-256, empty without keys. Raises BadParameter for settings that name
    what is no host or origin.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, keys: tuple[str, ...] = ()) -> None:
        self._app = app
        self._names = frozenset(map(_read_host, (*settings.allowed_hosts, settings.host))) | {"localhost"}
        self._origins = frozenset(map(_read_origin, settings.cors_origins))
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        self._max_body = settings.max_body_bytes
        self._body_seconds = settings.slow_reader_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through, or refuse."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        headers = Headers(scope=scope)
        origin = self._named_origin(headers)
        body = _Body(receive, send, self._max_body, self._body_seconds, origin)
        refusal = self._refusal(scope, headers)
        if refusal is None and scope["method"] == "OPTIONS" and origin and "access-control-request-method" in headers:
            refusal = _preflight(headers)
        if refusal is not None:
            await refusal(scope, receive, body.send)
            return
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.refusal is None:
                raise
        if body.refusal is not None and not body.started:
            await body.refusal(scope, receive, body.pass_on)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that may not come in; None for one that may."""
        scope.setdefault("state", {})["key"] = ""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0], scope):
            return error_response(
                421,
                "This server does not answer to the name in the Host header; "
                "use its address, or start it with --allowed-hosts NAME.",
                "wrong_host",
            )
        refusal = self._wrong_origin(scope, headers, hosts[0])
        # A browser asks for leave (OPTIONS) without the key; what it gets says nothing but which origins are let in.
        if refusal is None and not (scope["method"] == "OPTIONS" and self._named_origin(headers)):
            refusal = self._wrong_key(scope, headers)
        if refusal is None and scope["method"] not in _SAFE_METHODS:
            refusal = self._wrong_body(headers)
        return refusal

    def _is_ours(self, host: str, scope: Scope) -> bool:
        name = _host_name(host)
        if name in self._names or is_loopback(name):
            return True
        # The address that was connected to, written as such: no name was turned to lead here.
        local = (scope.get("server") or ("",))[0].removeprefix("::ffff:")
        return _is_address(name) and name == local

    def _named_origin(self, headers: Headers) -> str | None:
        origin = headers.get("origin", "")
        return origin if origin in self._origins else None

    def _wrong_origin(self, scope: Scope, headers: Headers, host: str) -> Response | None:
        """Refuse what a page elsewhere sends; what it only reads, the browser keeps from it."""
        origins = headers.getlist("origin")
        if not origins or scope["method"] in {"GET", "HEAD"}:
            return None
        if len(origins) == 1 and (origins[0] in self._origins or _same_place(origins[0], host)):
            return None
        return error_response(
            403,
            "Web pages from elsewhere may not ask this server; start it with --cors-origins ORIGIN to let one.",
            "wrong_origin",
        )

    def _wrong_key(self, scope: Scope, headers: Headers) -> Response | None:
        given = headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # All are compared, so that the time tells neither which one fitted nor how far.
        fits = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() == "bearer" and any(fits):
            scope["state"]["key"] = digest.hex()[:_LABEL_DIGITS]
            return None
        if not self._digests or scope["path"] in OPEN_PATHS or scope["path"].startswith("/page/"):
            return None
        return error_response(
            401,
            "An API key of this server is needed: send it as Authorization: Bearer KEY.",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _wrong_body(self, headers: Headers) -> Response | None:
        kinds = headers.getlist("content-type")
        if len(kinds) != 1 or kinds[0].partition(";")[0].strip().lower() != "application/json":
            return error_response(415, "Send JSON, with Content-Type: application/json.", "wrong_content_type")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return error_response(400, "The Content-Length header is no number of bytes; mend it.", "bad_request")
        # as text first: int() takes long for very long ones
        if len(length) > 18 or int(length) > self._max_body:
            return _too_large(self._max_body)
        return None


class _Body:
    """A request's body as it comes in, counted and within time, and the answer on its way out.

    Once the body was too much, whatever the application answers is replaced: how it takes the end is its own affair.
    """

    def __init__(self, receive: Receive, send: Send, most: int, seconds: float, origin: str | None) -> None:
        self._receive = receive
        self._send = send
        self._most = most
        self._seconds = seconds
        self._origin = origin
        self._read = 0
        self._whole = False
        self.started = False
        self.refusal: ErrorResponse | None = None

    async def receive(self) -> Message:
        """The next piece. Raises OSError when there were too many bytes, or none for too long."""
        if self._whole:
            return await self._receive()
        try:
            with anyio.fail_after(self._seconds):
                message = await self._receive()
        except TimeoutError:
            self.refusal = error_response(
                408, f"The body did not go on for {self._seconds:g} s; send it whole.", "timeout"
            )
            raise
        self._read += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._read > self._most:
            self.refusal = _too_large(self._most)
            raise OSError("the body is too large")
        return message

    async def send(self, message: Message) -> None:
        """Pass the application's answer on, unless another one is due."""
        if self.refusal is not None and not self.started:
            return
        await self.pass_on(message)

    async def pass_on(self, message: Message) -> None:
        """Send, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers.setdefault("x-content-type-options", "nosniff")
            if self._origin:
                headers["access-control-allow-origin"] = self._origin
                headers["access-control-expose-headers"] = "retry-after, server-timing, x-request-id"
                headers.add_vary_header("Origin")
        await self._send(message)


def read_keys(settings: ServerSettings, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the API keys: those of the file, one a line (empty lines and such with # are left out), and the variable.

    Raises BadParameter when the file cannot be read or holds none, when a key holds characters that no header can
    carry, or when OPSIN_API_KEY is set but empty. A key is never part of the sentence.
    """
    keys: list[str] = []
    if settings.api_key_file is not None:
        try:
            lines = settings.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise BadParameter(
                f"The file of API keys, {settings.api_key_file}, cannot be read; check its name and permissions."
            ) from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise BadParameter(f"The file of API keys, {settings.api_key_file}, holds none; write one a line.")
    if KEY_VARIABLE in environ:
        keys.append(environ[KEY_VARIABLE].strip())
        if not keys[-1]:
            raise BadParameter(
                f"{KEY_VARIABLE} is set but empty, which would protect nothing; give it a key or unset it."
            )
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise BadParameter("An API key holds a space or a character that is not ASCII; use letters, digits and signs.")
    return tuple(dict.fromkeys(keys))


def check_binding(settings: ServerSettings, keys: tuple[str, ...]) -> None:
    """Raise BadParameter for settings that would let in more than was asked for, before anything listens.

    That is an address that others can reach without an API key, and hosts and origins that are not written as such.
    """
    for host in (*settings.allowed_hosts, settings.host):
        _read_host(host)
    for origin in settings.cors_origins:
        _read_origin(origin)
    if not keys and not is_loopback(settings.host):
        raise BadParameter(
            f"Others can reach {settings.host!r}, so an API key is needed: give --api-key-file FILE or set "
            f"{KEY_VARIABLE}, or listen on 127.0.0.1."
        )


def _read_host(host: str) -> str:
    name = _host_name(_bracketed(host))
    if not name or "*" in name:
        raise BadParameter(f"{host!r} is no host name or address; write it without scheme and port, as example.org.")
    return name


def _read_origin(origin: str) -> str:
    parts = _split(origin)
    if parts is None or parts.scheme not in _DEFAULT_PORTS or not parts.hostname or "*" in origin:
        raise BadParameter(
            f"{origin!r} is no origin of web pages; write https://example.org, with a port if it has one."
        )
    if origin != f"{parts.scheme}://{parts.netloc}" or "@" in origin or origin != origin.lower():
        raise BadParameter(f"{origin!r} is more than an origin; write {parts.scheme}://{parts.hostname} and no more.")
    return origin


def _split(url: str) -> SplitResult | None:
    """The parts of an address; None when it is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises too
    except ValueError:
        return None
    return parts


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _host_name(host: str) -> str:
    """The name or address in a Host header, in small letters, without port and last dot; empty when it is none."""
    parts = _split(f"//{host}")
    if parts is None or parts.netloc != host or "@" in host:
        return ""
    return (parts.hostname or "").removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Whether a host, written as a name or an address, can only be this machine."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _same_place(origin: str, host: str) -> bool:
    """Whether a page's origin is the very host that is asked; TLS may end at a proxy, so either scheme will do."""
    page, asked = _split(origin), _split(f"//{host}")
    if page is None or asked is None or page.scheme not in _DEFAULT_PORTS or page.hostname != asked.hostname:
        return False
    usual = _DEFAULT_PORTS[page.scheme]
    return (page.port or usual) == (asked.port or usual)


def _preflight(headers: Headers) -> Response:
    """What a browser wants to know before a page of a named origin may ask."""
    wanted: Iterable[str] = (
        name.strip().lower() for name in headers.get("access-control-request-headers", "").split(",")
    )
    known = [name for name in wanted if name in {"authorization", "content-type"} or name.startswith("x-stainless-")]
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": ", ".join(known) or "authorization, content-type",
            "Access-Control-Max-Age": "600",
        },
    )


def _too_large(most: int) -> ErrorResponse:
    return error_response(
        413, f"The request is larger than the {most:,} bytes it may have; send fewer or smaller pictures.", "too_large"
    )
