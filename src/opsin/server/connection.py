"""HTTP/1.1 connections that do not wait for ever: for a request's head, or for a client that reads nothing."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

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
