"""What a server needs once, at its start: API keys, a check of who could reach it, a socket, and uvicorn."""

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Mapping, Sequence

import uvicorn
from starlette.types import ASGIApp

from opsin.core.config import KEY_VARIABLE
from opsin.core.errors import BadParameter
from opsin.core.settings import ServerSettings
from opsin.server.middleware import Connection, is_loopback, read_host, read_origin

BACKLOG = 128
"""Connections that may wait. asyncio takes as many at once before it counts them: too many would use up all files."""
LAST_BYTES_SECONDS = 5
"""How long open connections may take to read what was answered when the server ends."""
KEEP_ALIVE_SECONDS = 75
"""Idle connections stay open longer than clients keep them (httpx, and with it OpenAI's client, 5 s): the client must
be the first to close, or a request crosses the close on its way and is lost."""


def http_server(app: ASGIApp, slow_reader_seconds: float, proxies: Sequence[str] = ()) -> uvicorn.Server:
    """Uvicorn with patient connections. It leaves signals alone: running answers end before the HTTP server does."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        http=type("Connection", (Connection,), {"patience": slow_reader_seconds}),
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        server_header=False,
        headers=[("X-Content-Type-Options", "nosniff")],
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_BYTES_SECONDS,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]
    return server


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises BadParameter."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # Inherited by its connections, for which asyncio forgets it: else an answer waits 40 ms for the client to
        # acknowledge its head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener  # noqa: TRY300 - what fails above is told below
    except (OSError, UnicodeError) as error:  # the second for names that no host can have
        known = {
            errno.EADDRINUSE: f"Port {port} of {host} is in use by another program: give another (--port; 0: any).",
            errno.EACCES: f"Port {port} needs more rights than you have: give one above 1023 (--port).",
        }
        unknown = f"{host} is no address of this machine to listen on: give another (--host)."
        raise BadParameter(known.get(getattr(error, "errno", 0), unknown)) from None


def address_of(listener: socket.socket) -> str:
    """`HOST:PORT` of a listening socket, IPv6 in brackets; loopback where it listens on all addresses."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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
        read_host(host)
    for origin in settings.cors_origins:
        read_origin(origin)
    if not keys and not is_loopback(settings.host):
        raise BadParameter(
            f"Others can reach {settings.host!r}, so an API key is needed: give --api-key-file FILE or set "
            f"{KEY_VARIABLE}, or listen on 127.0.0.1."
        )
