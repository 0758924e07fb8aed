"""How many decoded pixels a server holds at the same time: who needs more than there is room for waits.

A request holds its pixels until it ends, as its images lie in memory until then. All of this runs on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from opsin.core.errors import ImageTooLarge, QueueFull


@dataclass(slots=True, eq=False)
class Holder:
    """One request: the pixels it holds, and how many of its images wait for more."""

    pixels: int = 0
    waiting: int = 0
    room: PixelBudget | None = None

    def release(self) -> None:
        """Give everything back."""
        if self.room is not None:
            self.room.give_back(self, self.pixels)


_holder: ContextVar[Holder | None] = ContextVar("opsin_pixel_holder", default=None)


@contextmanager
def holding_pixels() -> Iterator[None]:
    """Around a request: pixels taken inside are given back at its end."""
    holder = Holder()
    token = _holder.set(holder)
    try:
        yield
    finally:
        _holder.reset(token)
        holder.release()


def current_holder() -> Holder | None:
    """The request that runs here; None outside of one."""
    return _holder.get()


@dataclass(slots=True, eq=False)
class _Waiter:
    pixels: int
    holder: Holder
    granted: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class PixelBudget:
    """Room for `limit` pixels, given first come, first served; a request that holds some already goes first."""

    limit: int
    used: int = 0
    _queue: list[_Waiter] = field(default_factory=list)
    _holders: set[Holder] = field(default_factory=set)

    async def take(self, pixels: int, holder: Holder) -> None:
        """Wait until there is room for `pixels` more, then hold them for `holder`.

        Raises ImageTooLarge when the holder would have more than the whole room, and QueueFull when all that hold
        pixels wait for more, so that nobody would ever go on.
        """
        if holder.pixels + pixels > self.limit:
            raise ImageTooLarge(
                f"The images of this request have more than {self.limit:,} pixels together; "
                "send fewer, or scale them down first."
            )
        holder.room = self
        waiter = _Waiter(pixels, holder, asyncio.get_running_loop().create_future())
        self._queue.append(waiter)
        holder.waiting += 1
        try:
            self._serve()
            if not waiter.granted.done() and all(other.waiting for other in self._holders):
                raise QueueFull("Too many large images are in work; try again in a moment, or send smaller ones.")
            await waiter.granted
        finally:
            holder.waiting -= 1
            if waiter in self._queue:
                self._queue.remove(waiter)
                self._serve()

    def give_back(self, holder: Holder, pixels: int) -> None:
        """Take so many pixels back from `holder`."""
        self.used -= pixels
        holder.pixels -= pixels
        if not holder.pixels:
            self._holders.discard(holder)
        self._serve()

    def _serve(self) -> None:
        """Grant what fits. Nobody new is let in while somebody who holds pixels waits for more."""
        blocked = False
        for waiter in sorted(self._queue, key=lambda waiter: not waiter.holder.pixels):
            if self.used + waiter.pixels <= self.limit and not (blocked and not waiter.holder.pixels):
                self._queue.remove(waiter)
                self.used += waiter.pixels
                waiter.holder.pixels += waiter.pixels
                self._holders.add(waiter.holder)
                waiter.granted.set_result(None)
            else:
                blocked = True
