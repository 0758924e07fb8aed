"""What every handler is given."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

from opsin.core.server_settings import ServerSettings
from opsin.server.model import ModelManager
from opsin.server.pictures import PictureGate
from opsin.server.record import Record, Watcher


class Waker:
    """Sets events of the loop from another thread: one wake-up of the loop for all that an engine step sets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._due: list[asyncio.Event] = []

    def set_soon(self, event: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
        """Set it in the loop; any thread. Raises RuntimeError when the loop is closed."""
        with self._lock:
            if loop is not self._loop:  # an older one may have ended before it set what was due
                self._loop, self._due = loop, []
            self._due.append(event)
            first = len(self._due) == 1
        if first:
            loop.call_soon_threadsafe(self._set_all)

    def _set_all(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for event in due:
            event.set()


@dataclass(frozen=True, slots=True)
class Context:
    """The settings, the model, the door that pictures come in by, and those who are told of each request."""

    settings: ServerSettings
    model: ModelManager
    pictures: PictureGate
    watchers: tuple[Watcher, ...] = ()
    waker: Waker = field(default_factory=Waker)

    def finished(self, record: Record) -> None:
        """Tell everybody that a request ended; called once a request, after its last byte."""
        for watcher in self.watchers:
            watcher.finished(record)
