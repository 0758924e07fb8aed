"""Whose KV cells are in which memory.

All sequences share one memory, or each has a place of its own (`BackendLimits.shared`). Beside such places there may be
a common memory, for sequences that begin alike: its members share the cells of their beginning there. Their own places
stay theirs, empty, so that a member can go back at any time.
"""

from __future__ import annotations

from collections.abc import Iterable

from opsin.cache import CellBook
from opsin.core.backend import BackendLimits


class Books:
    """One book of the cells that sequences hold, and one of those that are in the common memory."""

    def __init__(self, limits: BackendLimits) -> None:
        self._limits = limits
        self._all = CellBook()
        self.common = CellBook()
        self.members: set[int] = set()

    @property
    def used(self) -> int:
        """Cells in use; where each sequence has a place of its own, a member's count as if they were there."""
        return self._all.used

    @property
    def room(self) -> int:
        """Cells that are free."""
        return self._limits.n_ctx - self._all.used

    @property
    def common_room(self) -> int:
        """Cells of the common memory that are free."""
        return self._limits.common - self.common.used

    def held(self, seq_id: int) -> int:
        """Cells a sequence sees, shared ones included."""
        return self._all.held(seq_id)

    def seen_together(self, seq_ids: Iterable[int]) -> tuple[list[int], CellBook]:
        """Those of these sequences whose steps look at each other's cells, and the book of those cells."""
        if self._limits.shared:
            return list(seq_ids), self._all
        return [seq_id for seq_id in seq_ids if seq_id in self.members], self.common

    def append(self, seq_id: int, cells: int) -> None:
        """A sequence took new cells at its end."""
        self._all.append(seq_id, cells)
        if seq_id in self.members:
            self.common.append(seq_id, cells)

    def fork(self, source: int, target: int, cells: int) -> None:
        """An empty sequence begins with the first `cells` of another, in the same memory."""
        if self._limits.shared:
            self._all.fork(source, target, cells)
            return
        self._all.append(target, cells)
        if source in self.members:
            self.common.fork(source, target, cells)
            self.members.add(target)

    def cut(self, seq_id: int, cells: int) -> None:
        """A sequence forgets all but its first `cells`; who forgets everything is no member any more."""
        self._all.cut(seq_id, cells)
        if seq_id in self.members:
            self.common.cut(seq_id, cells)
            if not cells:
                self.members.remove(seq_id)

    def drop(self, seq_id: int) -> None:
        """A sequence forgets everything."""
        self.cut(seq_id, 0)

    def move(self, source: int, target: int) -> None:
        """All that a sequence holds is under another id from now on, in the same memory."""
        self._all.move(source, target)
        if source in self.members:
            self.common.move(source, target)
            self.members.remove(source)
            self.members.add(target)

    def join(self, seq_id: int) -> None:
        """A sequence's cells go from its own place to the common memory."""
        self.members.add(seq_id)
        self.common.append(seq_id, self.held(seq_id))

    def leave(self, seq_id: int) -> None:
        """A member's cells go back to its own place."""
        self.common.drop(seq_id)
        self.members.remove(seq_id)

    def check(self) -> None:
        """The books agree with themselves and with each other. Raises AssertionError."""
        self._all.check()
        self.common.check()
        assert self._all.used <= self._limits.n_ctx, "more cells are booked than there are"
        assert self.common.used <= self._limits.common, "more cells are in the common memory than it has"
        for seq_id in self.members:
            assert self.common.held(seq_id) == self.held(seq_id), "a member's cells differ between the books"
