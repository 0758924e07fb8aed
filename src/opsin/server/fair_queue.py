"""Room in the engine, handed out among API keys in turn. All of it runs on one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from opsin.core.errors import QueueFull


@dataclass(slots=True, eq=False)
class _Waiter:
    n: int
    granted: asyncio.Future[None]


class FairQueue:
    """Lets `parallel` answers run and as many wait in the engine; the others wait here, each key in a line of its own.

    Keys take turns, whatever they ask for. At most `max_queue` answers wait, here and in the engine together. If there
    are more, the newest request of the key with the most waiting answers is refused, so that a key that asks for much
    takes no place from a key that asks for little.
    """

    def __init__(self, parallel: int, max_queue: int) -> None:
        ahead = min(parallel, max_queue)
        self._room = parallel + ahead
        self._longest = max_queue - ahead
        self._used = 0
        self._lines: dict[str, deque[_Waiter]] = {}

    @property
    def waiting(self) -> int:
        """Answers that wait here."""
        return sum(map(self._length, self._lines))

    async def take(self, key: str, n: int) -> None:
        """Wait for room for `n` answers, to be given back with `leave`. Raises QueueFull."""
        waiter = _Waiter(n, asyncio.get_running_loop().create_future())
        self._lines.setdefault(key, deque()).append(waiter)
        self._serve()
        if self.waiting > self._longest:
            longest = max(self._lines, key=lambda one: (self._length(one), one == key))
            refused = self._lines[longest][-1]
            self._drop(longest, refused)
            if not refused.granted.done():
                refused.granted.set_exception(QueueFull("Too many requests wait already: try again in a moment."))
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled():
                self._drop(key, waiter)
                self._serve()
            elif waiter.granted.exception() is None:
                self.leave(n)
            raise

    def leave(self, n: int) -> None:
        """Give room for `n` answers back."""
        self._used -= n
        self._serve()

    def _length(self, key: str) -> int:
        return sum(waiter.n for waiter in self._lines[key])

    def _drop(self, key: str, waiter: _Waiter) -> None:
        line = self._lines.get(key, deque())
        if waiter in line:
            line.remove(waiter)
        if not line:
            self._lines.pop(key, None)

    def _serve(self) -> None:
        """Grant room to the keys in turn, as long as it suffices for the key whose turn it is."""
        while self._lines:
            key, line = next(iter(self._lines.items()))
            waiter = line[0]
            # A request for more than the whole room runs alone.
            if self._used and self._used + waiter.n > self._room:
                return
            del self._lines[key]
            line.popleft()
            if line:
                self._lines[key] = line  # at the end of the turn order
            if not waiter.granted.done():  # it is done if its request was cancelled just now
                self._used += waiter.n
                waiter.granted.set_result(None)
