"""The book of KV cells: who holds how many, and which are shared.

In unified memory a fork shares cells, so what sequences hold adds up to more than is used. The book knows both:

    sequence 0:  [ 600, shared by 3 ][ 12 ]
    sequence 1:  [ 600, the same    ][ 9 ]          used: 600 + 12 + 9 + 20
    sequence 2:  [ 600, the same    ][ 20 ]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class _Stretch:
    cells: int
    holders: int


class CellBook:
    """Counts of cells by sequence id; knows no model. `check` holds after every call."""

    def __init__(self) -> None:
        self._held: dict[int, list[_Stretch]] = {}
        self.used = 0

    def held(self, seq_id: int) -> int:
        """Cells a sequence sees, shared ones included."""
        return sum(stretch.cells for stretch in self._held.get(seq_id, ()))

    def held_by(self, seq_ids: Iterable[int]) -> int:
        """Cells that at least one of these sequences sees."""
        stretches = {id(s): s.cells for seq_id in seq_ids for s in self._held.get(seq_id, ())}
        return sum(stretches.values())

    def append(self, seq_id: int, cells: int) -> None:
        """A sequence took new cells at its end."""
        stretches = self._held.setdefault(seq_id, [])
        if stretches and stretches[-1].holders == 1:
            stretches[-1].cells += cells
        else:
            stretches.append(_Stretch(cells, 1))
        self.used += cells

    def fork(self, source: int, target: int, cells: int) -> None:
        """An empty sequence shares the first `cells` of another."""
        assert target not in self._held, "a fork begins empty"
        assert cells <= self.held(source), "a fork cannot share what is not there"
        self._split(source, cells)
        shared, count = [], 0
        for stretch in self._held[source]:
            if count == cells:
                break
            stretch.holders += 1
            count += stretch.cells
            shared.append(stretch)
        if shared:
            self._held[target] = shared

    def cut(self, seq_id: int, cells: int) -> None:
        """A sequence forgets all but its first `cells`."""
        if seq_id not in self._held:
            return
        self._split(seq_id, cells)
        stretches, count = self._held[seq_id], 0
        keep: list[_Stretch] = []
        for stretch in stretches:
            if count < cells:
                keep.append(stretch)
                count += stretch.cells
                continue
            stretch.holders -= 1
            if stretch.holders == 0:
                self.used -= stretch.cells
        if keep:
            self._held[seq_id] = keep
        else:
            del self._held[seq_id]

    def move(self, source: int, target: int) -> None:
        """All that a sequence holds goes to an empty one."""
        assert target not in self._held, "a move needs an empty place"
        if source in self._held:
            self._held[target] = self._held.pop(source)

    def drop(self, seq_id: int) -> None:
        """A sequence forgets everything."""
        self.cut(seq_id, 0)

    def check(self) -> None:
        """The book agrees with itself. Raises AssertionError."""
        holders: dict[int, int] = {}
        stretches: dict[int, _Stretch] = {}
        for held in self._held.values():
            for stretch in held:
                holders[id(stretch)] = holders.get(id(stretch), 0) + 1
                stretches[id(stretch)] = stretch
        assert all(stretch.cells > 0 for stretch in stretches.values())
        assert all(stretches[key].holders == count for key, count in holders.items())
        assert sum(stretch.cells for stretch in stretches.values()) == self.used

    def _split(self, seq_id: int, cells: int) -> None:
        """Let a stretch of this sequence end exactly behind its first `cells`, for all who hold it."""
        count = 0
        for stretch in self._held.get(seq_id, ()):
            if count < cells < count + stretch.cells:
                rest = _Stretch(count + stretch.cells - cells, stretch.holders)
                stretch.cells -= rest.cells
                for held in self._held.values():
                    for index, other in enumerate(held):
                        if other is stretch:
                            held.insert(index + 1, rest)
                            break
                return
            count += stretch.cells
