"""What a caller hands in, and the stream handed back."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from opsin.core.answer import Answer, Event, Finished
from opsin.core.errors import Cancelled, again
from opsin.core.parts import Prompt
from opsin.core.sampling import SamplingParams

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


@dataclass(slots=True)
class AnswerStream:
    """The events of one answer, read by one reader: `for` in plain code, `async for` on an event loop.

    Delivery never blocks the engine. The stream ends after `Finished`, or raises the request's error.
    """

    on_cancel: Callable[[], None]
    on_end: Callable[[], None] | None = None
    cancelled: bool = False
    _events: deque[Event] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _error: BaseException | None = None
    _done: bool = False
    _wake: Callable[[], object] | None = None

    def deliver(self, event: Event) -> None:
        """Hand one event over; called by the engine."""
        with self._changed:
            if self._done:
                return
            if len(self._events) < MAX_UNREAD:
                self._events.append(event)
            else:
                # Nobody reads: the answer ends here, and its memory is for others.
                self.cancelled = True
                self._error = Cancelled(f"The reader is {MAX_UNREAD} events behind: the answer was cut.")
            self._done = isinstance(event, Finished) or self._error is not None
            self._notify()
            ended = self._done  # telling the reader may have ended it
        if ended:
            self._ended()

    def fail(self, error: BaseException) -> None:
        """End the stream with an error; the first end counts."""
        with self._changed:
            if self._done:
                return
            self._error = error
            self._done = True
            self._notify()
        self._ended()

    def cancel(self) -> None:
        """Go away: the engine frees the sequence within one step."""
        self.cancelled = True
        self.fail(Cancelled("The answer was cancelled."))
        self.on_cancel()

    def listen(self, wake: Callable[[], object]) -> None:
        """Call `wake` from now on, in any thread, whenever something can be taken; instead of iterating."""
        with self._changed:
            self._wake = wake
            if self._events or self._done:
                wake()

    def take(self) -> tuple[list[Event], BaseException | None]:
        """What has come since the last time, without waiting, and the error that the stream has ended with."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
            return events, self._error

    @property
    def done(self) -> bool:
        """True once the last event or the error is in."""
        return self._done

    def _ended(self) -> None:
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._wake is None:
            return
        try:
            self._wake()
        except RuntimeError:
            # The reader's event loop was closed under it. That is leaving, and no fault of the thread that delivers.
            self._wake, self.cancelled = None, True
            if not self._done:
                self._error = Cancelled("The event loop of the answer's reader was closed.")
                self._done = True

    def _take(self) -> Event | None:
        """The next event, None when there is none yet; raises the error, or StopIteration at the end."""
        if self._events:
            return self._events.popleft()
        if self._error is not None:
            # What is raised holds the frames it went through, and they hold this stream and the reader's pictures. Kept
            # here, it would close a ring that only a full garbage collection opens, after megabytes of them.
            error, self._error = self._error, again(self._error)
            try:
                raise error
            finally:
                del error
        if self._done:
            raise StopIteration
        return None

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, waiting in this thread."""
        while True:
            with self._changed:
                while not self._events and not self._done:
                    self._changed.wait()
                try:
                    event = self._take()
                except StopIteration:
                    return
            if event is not None:
                yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events as they come, without blocking the running loop; leaving early cancels."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        with self._changed:
            self._wake = lambda: loop.call_soon_threadsafe(ready.set)
        try:
            while True:
                ready.clear()
                with self._changed:
                    try:
                        event = self._take()
                    except StopIteration:
                        return
                if event is None:
                    await ready.wait()
                else:
                    yield event
        finally:
            with self._changed:
                self._wake = None
                finished = self._done
            if not finished:
                self.cancel()

    def result(self) -> Answer:
        """Wait for the whole answer. Raises the request's error."""
        for event in self:
            if isinstance(event, Finished):
                return event.answer
        raise Cancelled("The answer was already read.")

    async def answer(self) -> Answer:
        """Wait for the whole answer without blocking the loop. Raises the request's error."""
        async for event in self:
            if isinstance(event, Finished):
                return event.answer
        raise Cancelled("The answer was already read.")
