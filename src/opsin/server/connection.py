"""The listening socket, and HTTP/1.1 connections that do not wait for ever: neither for a head nor for a reader."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from opsin.core.errors import BadParameter

BACKLOG = 2048
LAST_BYTES_SECONDS = 5
"""How long open connections may take to read what was answered when the server ends."""
KEEP_ALIVE_SECONDS = 75
"""Idle connections stay open longer than clients keep them (httpx, and with it OpenAI's client, 5 s): the client must
be the first to close, or a request crosses the close on its way and is lost."""
_LOG = logging.getLogger("opsin.server")


class Connection(H11Protocol):
    """uvicorn's connection with two limits more.

    A head that takes longer than `patience` seconds ends the connection, as does a client that takes nothing of its
    answer for so long; the answer then ends as after any hang-up. Before its first request an idle connection ends
    with uvicorn's keep-alive time, after one at most `patience` later, also when the end of the answer lies unread.
    """

    patience: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._request: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        """Wait for the first request."""
        super().connection_made(transport)
        self._await_request(self.timeout_keep_alive)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head."""
        super().data_received(data)
        if self._answering():
            _stop(self._request)
        elif not self._in_head:
            self._in_head = True
            self._await_request(self.patience)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if not self._answering():
            self._in_head = bool(self.conn.trailing_data[0])
            self._await_request(self.patience + (0 if self._in_head else self.timeout_keep_alive))

    def pause_writing(self) -> None:
        """The client reads slower than is written."""
        super().pause_writing()
        self._reader = self.loop.call_later(self.patience, self._cut)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        _stop(self._reader)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        super().connection_lost(exc)
        _stop(self._request)
        _stop(self._reader)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_request(self, seconds: float) -> None:
        _stop(self._request)
        self._request = self.loop.call_later(seconds, self.transport.abort)

    def _cut(self) -> None:
        _LOG.warning("an answer was ended: its client read nothing for %g s", self.patience)
        self.transport.abort()


def patient(seconds: float) -> type[Connection]:
    """Connections with that patience, for uvicorn."""
    return type("Connection", (Connection,), {"patience": seconds})


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class HttpServer(uvicorn.Server):
    """uvicorn with patient connections. It leaves signals alone: running answers end before the HTTP server does."""

    def __init__(self, app: ASGIApp, slow_reader_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                http=patient(slow_reader_seconds),
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=LAST_BYTES_SECONDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises BadParameter."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # the second for names that no host can have
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise BadParameter(
                f"Port {port} of {host} is in use by another program: give another (--port; 0 takes a free one)."
            ) from None
        if number == errno.EACCES:
            raise BadParameter(f"Port {port} needs more rights than you have: give one above 1023 (--port).") from None
        raise BadParameter(f"{host} is no address of this machine to listen on: give another (--host).") from None


def address_of(listener: socket.socket) -> str:
    """`HOST:PORT` of a listening socket, IPv6 in brackets; loopback where it listens on all addresses."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
