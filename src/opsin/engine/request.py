"""What a caller hands in, and the stream handed back."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from opsin.core.answer import Answer, Event, Finished
from opsin.core.errors import Cancelled, copy_of
from opsin.core.request import Prompt, SamplingParams

MAX_UNREAD = 8192
"""Events that may wait for their reader."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question.

    `max_tokens` is the limit in force, `deadline` the end of its time in seconds of the engine's clock. Higher
    `priority` goes first; within one, first come. Requests of different `salt` share nothing that is remembered.
    """

    prompt: Prompt
    params: SamplingParams
    max_tokens: int
    seed: int
    deadline: float | None = None
    priority: int = 0
    salt: str = ""
    number: int = 0


class AnswerStream:
    """The events of one answer, read by one reader: `for` in plain code, `async for` on an event loop.

    Delivery never blocks the engine. The stream ends after `Finished`, or raises the request's error. `on_cancel` and
    `on_end` are called once, when the reader goes away and when the last event is in. `wake` tells readers of several
    streams that there is something to read.
    """

    def __init__(self, on_cancel: Callable[[], None], wake: Wake | None = None) -> None:
        self._on_cancel = on_cancel
        self.on_end: Callable[[], None] | None = None
        self.cancelled = False
        self._wake = wake or wake_readers
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._done = False
        self._waiting = False
        self._only_end = False
        self.reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def done(self) -> bool:
        """True once the last event or the error is in."""
        return self._done

    def add(self, event: Event) -> None:
        """Put an event in without waking the reader: the engine wakes the readers of a whole step at once."""
        if self._done:
            return
        if isinstance(event, Finished):
            self._events.append(event)
            self._end(None)
        elif not self._only_end:
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
            if self._done:
                return
            self._error, self._done = error, True
            on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()

    def notify(self) -> None:
        """Wake a reader that waits in a thread."""
        # The reader sets the flag before it looks for events a last time, so none is missed.
        if self._waiting and (self._done or not self._only_end):
            with self._changed:
                self._changed.notify_all()

    def left(self) -> None:
        """The reader's event loop was closed under it: that is leaving, and no fault of the thread that delivers."""
        self.reader, self.cancelled = None, True
        self._end(Cancelled("The event loop of the answer's reader was closed."))
        self.notify()

    def read_with(self, loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
        """From now on `ready` is set, in that loop, whenever something can be taken: for a reader of many streams."""
        self.reader = (loop, ready)
        if self._events or self._done:
            ready.set()

    def take(self) -> tuple[list[Event], BaseException | None]:
        """What has come since the last time, without waiting, and the error that the stream has ended with."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events, self._error

    def _take(self) -> Event | None:
        """The next event, None when there is none yet; raises the error, or StopIteration at the end."""
        if self._events:
            return self._events.popleft()
        if not self._done:
            return None
        if self._events:  # put in just before the end
            return self._events.popleft()
        if self._error is not None:
            # What is raised holds the frames it went through, and they hold this stream and the reader's images. Kept
            # here, it would close a ring that only a full garbage collection opens, after megabytes of them.
            error, self._error = self._error, copy_of(self._error)
            try:
                raise error
            finally:
                del error
        raise StopIteration

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, waiting in this thread."""
        while True:
            try:
                event = self._take()
            except StopIteration:
                return
            if event is not None:
                yield event
                continue
            with self._changed:
                self._waiting = True
                while not self._events and not self._done:
                    self._changed.wait()
                self._waiting = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events as they come, without blocking the running loop; leaving early cancels."""
        ready = asyncio.Event()
        self.reader = (asyncio.get_running_loop(), ready)
        try:
            while True:
                ready.clear()
                try:
                    event = self._take()
                except StopIteration:
                    return
                if event is None:
                    await ready.wait()
                else:
                    yield event
        finally:
            self.reader = None
            if not self._done:
                self.cancel()

    def result(self) -> Answer:
        """Wait for the whole answer. Raises the request's error."""
        self._only_end = True
        for event in self:
            if isinstance(event, Finished):
                return event.answer
        raise Cancelled("The answer was already read.")

    async def answer(self) -> Answer:
        """Wait for the whole answer without blocking the loop. Raises the request's error."""
        self._only_end = True
        async for event in self:
            if isinstance(event, Finished):
                return event.answer
        raise Cancelled("The answer was already read.")

    @property
    def wants_waking(self) -> bool:
        """Whether what is there now is worth waking the reader for."""
        return self._done or not self._only_end


Wake = Callable[[Sequence[AnswerStream]], None]
"""Called once a step with the streams that got events."""


def wake_readers(streams: Sequence[AnswerStream]) -> None:
    """Tell the readers of these streams that there is something to read, each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[AnswerStream]] = {}
    for stream in streams:
        if stream.reader is None:
            stream.notify()
        elif stream.wants_waking:
            by_loop.setdefault(stream.reader[0], []).append(stream)
    for loop, readers in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_all, readers)
        except RuntimeError:
            for stream in readers:
                stream.left()


def _set_all(streams: Sequence[AnswerStream]) -> None:
    for stream in streams:
        if stream.reader is not None:
            stream.reader[1].set()
