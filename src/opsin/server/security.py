"""Who may use the server, and from which web pages."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsin.core.errors import BadParameter
from opsin.core.settings import ServerSettings
from opsin.server.errors import ErrorResponse

KEY_VARIABLE = "OPSIN_API_KEY"
OPEN_PATHS = frozenset(("/", "/health", "/ready", "/favicon.ico"))
"""What needs no key; the page's own files below /page/ need none either."""


class SecurityMiddleware:
    """Lets a request in, or answers it with OpenAI's error body, before the body is read.

    Refused are Host names that are not the server's (421: a page elsewhere may have pointed its name here), web pages
    of other origins than the server's own and `cors_origins` (403), and requests without one of `keys`, if there are
    any (401). `scope["state"]["key"]` becomes the label of the key: the first 16 hex digits of its SHA-256, empty
    without keys. Raises BadParameter for settings that name something that is not a host or origin.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, keys: tuple[str, ...] = ()) -> None:
        self._app = app
        self._names = frozenset(map(_read_host, (*settings.allowed_hosts, settings.host))) | {"localhost"}
        self._origins = frozenset(map(_read_origin, settings.cors_origins))
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through, or refuse."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        named = origin if origin in self._origins else None
        scope.setdefault("state", {})["key"] = ""
        # A browser asks for leave (OPTIONS) without the key; the answer only says which origins are let in.
        asks_leave = named is not None and scope["method"] == "OPTIONS"
        answer: Response | None = self._wrong_host(scope, headers) or self._wrong_origin(scope, headers)
        if answer is None and not asks_leave:
            answer = self._wrong_key(scope, headers)
        elif answer is None and "access-control-request-method" in headers:
            answer = _preflight(headers)

        async def sending(message: Message) -> None:
            """Send, with the headers that every answer has."""
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                added.setdefault("x-content-type-options", "nosniff")
                if named:
                    added["access-control-allow-origin"] = named
                    added["access-control-expose-headers"] = "retry-after, server-timing, x-request-id"
                    added.add_vary_header("Origin")
            await send(message)

        await (answer or self._app)(scope, receive, sending)

    def _wrong_host(self, scope: Scope, headers: Headers) -> ErrorResponse | None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else ""
        # The address that was connected to, written as an address: no name was turned to lead here.
        local = (scope.get("server") or ("",))[0].removeprefix("::ffff:")
        if name in self._names or is_loopback(name) or (_address(name) and name == local):
            return None
        message = "The Host header does not name this server: use its address, or start it with --allowed-hosts NAME."
        return ErrorResponse(421, message, "wrong_host")

    def _wrong_origin(self, scope: Scope, headers: Headers) -> ErrorResponse | None:
        """Refuse what a page elsewhere sends. What it only reads, the browser keeps from it."""
        origins = headers.getlist("origin")
        if not origins or scope["method"] in {"GET", "HEAD"}:
            return None
        # Its own page; TLS may end at a proxy, so either scheme will do.
        own = {f"{scheme}://{headers['host']}" for scheme in ("http", "https")}
        if len(origins) == 1 and origins[0] in self._origins | own:
            return None
        message = "Web pages from elsewhere may not use this server: start it with --cors-origins ORIGIN to allow one."
        return ErrorResponse(403, message, "wrong_origin")

    def _wrong_key(self, scope: Scope, headers: Headers) -> ErrorResponse | None:
        given = headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # All are compared, so that the time does not tell which one matched, nor how far.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() == "bearer" and any(matches):
            scope["state"]["key"] = digest.hex()[:16]
            return None
        if not self._digests or scope["path"] in OPEN_PATHS or scope["path"].startswith("/page/"):
            return None
        message = "An API key of this server is needed: send it as Authorization: Bearer KEY."
        return ErrorResponse(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def read_keys(settings: ServerSettings, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The API keys: one per line of the file (empty lines and lines starting with # are skipped), and the variable.

    Raises BadParameter if the file cannot be read or has none, if a key has characters that no header can carry, or
    if OPSIN_API_KEY is set but empty. The message never contains a key.
    """
    keys: list[str] = []
    if settings.api_key_file is not None:
        try:
            text = settings.api_key_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            text = ""
        keys = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
        if not keys:
            raise BadParameter(
                f"The file of API keys, {settings.api_key_file}, cannot be read or has none: check its name and "
                "permissions, and write one key per line."
            )
    if KEY_VARIABLE in environ:
        keys.append(environ[KEY_VARIABLE].strip())
        if not keys[-1]:
            raise BadParameter(f"{KEY_VARIABLE} is set but empty, which protects nothing: give it a key or unset it.")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise BadParameter("An API key has a space or a character that is not ASCII: use letters, digits and signs.")
    return tuple(dict.fromkeys(keys))


def check_binding(settings: ServerSettings, keys: tuple[str, ...]) -> None:
    """Raise BadParameter for settings that would let in more than was asked for, before anything listens.

    These are an address that others can reach without an API key, and malformed hosts and origins.
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
    name = _host_name(f"[{host}]" if ":" in host and not host.startswith("[") else host)
    if not name or "*" in name:
        raise BadParameter(f"{host!r} is not a host name or address: write it without scheme and port, as example.org.")
    return name


def _read_origin(origin: str) -> str:
    scheme, _, host = origin.partition("://")
    if scheme not in {"http", "https"} or not _host_name(host) or "*" in host or host != host.lower():
        raise BadParameter(
            f"{origin!r} is not an origin: write https://example.org, in lower case, with a port if it has one, and "
            "without a path."
        )
    return origin


def _host_name(host: str) -> str:
    """The name or address in a Host header, in lower case, without port and last dot; empty if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises too
    except ValueError:
        return ""
    return "" if parts.netloc != host or "@" in host else (parts.hostname or "").removesuffix(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_loopback(name: str) -> bool:
    """Whether a host, written as a name or an address, can only be this machine."""
    address = _address(name)
    return name == "localhost" if address is None else address.is_loopback


def _preflight(headers: Headers) -> Response:
    """What a browser wants to know before a page of a named origin may send a request."""
    wanted = [name.strip().lower() for name in headers.get("access-control-request-headers", "").split(",")]
    known = [name for name in wanted if name in {"authorization", "content-type"} or name.startswith("x-stainless-")]
    allowed = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": ", ".join(known) or "authorization, content-type",
        "Access-Control-Max-Age": "600",
    }
    return Response(status_code=204, headers=allowed)
