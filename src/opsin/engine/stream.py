"""What the caller of one request reads: its events, in plain code or on an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from opsin.core.answer import Answer, Event, Finished
from opsin.core.errors import Cancelled, copy_of

MAX_UNREAD = 8192
"""Events that may wait for their reader."""


class AnswerStream:
    """The events of one answer, read by one reader: `for` in plain code, `async for` on an event loop.

    Delivery never blocks the engine. The stream ends after `Finished`, or raises the request's error. `on_cancel` and
    `on_end` are called once, when the reader goes away and when the last event is in. `wake` tells readers of several
    streams that there is something to read. `done` is True once the last event or the error is in.
    """

    def __init__(self, on_cancel: Callable[[], None], wake: Wake | None = None) -> None:
        self._on_cancel = on_cancel
        self._wake = wake or wake_readers
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._waiting = False
        self.on_end: Callable[[], None] | None = None
        self.done = self.cancelled = False
        self.only_end = False  # its reader waits for the whole answer
        self.reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def add(self, event: Event) -> None:
        """Put an event in without waking the reader: the engine wakes the readers of a whole step at once."""
        if self.done:
            return
        if isinstance(event, Finished):
            self._events.append(event)
            self._end(None)
        elif not self.only_end:
            self._events.append(event)
            if len(self._events) > MAX_UNREAD:
                # Nobody reads: the answer ends here, and its memory is for others.
                self.cancelled = True
                self._end(Cancelled(f"The reader is {MAX_UNREAD} events behind: the answer was cut."))

    def deliver(self, event: Event) -> None:
        """Hand one event over."""
        self.add(event)
        self._wake((self,))

    def fail(self, error: BaseException) -> None:
        """End the stream with an error; the first end counts."""
        self._end(error)
        self._wake((self,))

    def cancel(self) -> None:
        """Go away: the engine frees the sequence within one step."""
        self.cancelled = True
        self.fail(Cancelled("The answer was cancelled."))
        self._on_cancel()

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            if self.done:
                return
            self._error, self.done = error, True
            on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()

    def notify(self) -> None:
        """Wake a reader that waits in a thread."""
        # The reader sets the flag before it looks for events a last time, so none is missed.
        if self._waiting and (self.done or not self.only_end):
            with self._changed:
                self._changed.notify_all()

    def read_with(self, loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
        """From now on `ready` is set, in that loop, whenever something can be taken: for a reader of many streams."""
        self.reader = (loop, ready)
        if self._events or self.done:
            ready.set()

    def take(self) -> tuple[list[Event], BaseException | None]:
        """What has come since the last time, without waiting, and the error that the stream has ended with."""
        return [self._events.popleft() for _ in range(len(self._events))], self._error

    def _raise(self) -> None:
        """All is read: raise the error, if that is how it ended."""
        # What is raised holds the frames it went through, and they hold this stream and the reader's images. Kept here,
        # it would close a ring that only a full garbage collection opens, after megabytes of them.
        error, self._error = self._error, copy_of(self._error) if self._error is not None else None
        try:
            if error is not None:
                raise error
        finally:
            del error

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, waiting in this thread."""
        while True:
            done = self.done  # asked first, so that what was put in just before the end is read
            while self._events:
                yield self._events.popleft()
            if done:
                self._raise()
                return
            with self._changed:
                self._waiting = True
                self._changed.wait_for(lambda: self._events or self.done)
                self._waiting = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events as they come, without blocking the running loop; leaving early cancels."""
        ready = asyncio.Event()
        self.reader = (asyncio.get_running_loop(), ready)
        try:
            while True:
                ready.clear()
                done = self.done
                while self._events:
                    yield self._events.popleft()
                if done:
                    self._raise()
                    return
                await ready.wait()
        finally:
            self.reader = None
            if not self.done:
                self.cancel()

    def result(self) -> Answer:
        """Wait for the whole answer. Raises the request's error."""
        self.only_end = True
        for event in self:
            if isinstance(event, Finished):
                return event.answer
        raise Cancelled("The answer was already read.")

    async def answer(self) -> Answer:
        """Wait for the whole answer without blocking the loop. Raises the request's error."""
        self.only_end = True
        async for event in self:
            if isinstance(event, Finished):
                return event.answer
        raise Cancelled("The answer was already read.")


Wake = Callable[[Iterable[AnswerStream]], None]
"""Called once a step with the streams that got events."""


def wake_readers(streams: Iterable[AnswerStream]) -> None:
    """Tell the readers of these streams that there is something to read, each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[AnswerStream]] = {}
    for stream in streams:
        if stream.reader is None:
            stream.notify()
        elif stream.done or not stream.only_end:
            by_loop.setdefault(stream.reader[0], []).append(stream)
    for loop, readers in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_all, readers)
        except RuntimeError:  # the loop was closed under its readers: that is leaving, and not this thread's fault
            for stream in readers:
                stream.reader, stream.cancelled = None, True
                stream.fail(Cancelled("The event loop of the answer's reader was closed."))


def _set_all(streams: Iterable[AnswerStream]) -> None:
    for stream in streams:
        if stream.reader is not None:
            stream.reader[1].set()
