"""Who holds which cells of the KV cache, what ended sequences leave there, and who gets it next.

In the unified KV cache a fork shares cells, so what sequences hold adds up to more than is used. `CellBook` counts
both:

    sequence 0:  [ 600, shared by 3 ][ 12 ]
    sequence 1:  [ 600, the same    ][ 9 ]          used: 600 + 12 + 9 + 20
    sequence 2:  [ 600, the same    ][ 20 ]
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from opsin.cache import Prefix, PrefixIndex
from opsin.cache.prefix import Match, cells_of, last_position_of, positions_of
from opsin.core.backend import BackendLimits
from opsin.engine.plan import Forget, Fork, KVOp


@dataclass(slots=True, eq=False)
class _Segment:
    cells: int
    holders: int


class CellBook:
    """Counts of cells by sequence id; `check` holds after every call."""

    def __init__(self) -> None:
        self._held: dict[int, list[_Segment]] = {}
        self.used = 0

    def held(self, seq_id: int) -> int:
        """Cells a sequence sees, shared ones included."""
        return sum(segment.cells for segment in self._held.get(seq_id, ()))

    def held_by(self, seq_ids: Iterable[int]) -> int:
        """Cells that at least one of these sequences sees."""
        segments = {id(s): s.cells for seq_id in seq_ids for s in self._held.get(seq_id, ())}
        return sum(segments.values())

    def append(self, seq_id: int, cells: int) -> None:
        """A sequence took new cells at its end."""
        segments = self._held.get(seq_id)
        if segments is None:
            segments = self._held[seq_id] = []
        if segments and segments[-1].holders == 1:
            segments[-1].cells += cells
        else:
            segments.append(_Segment(cells, 1))
        self.used += cells

    def fork(self, source: int, target: int, cells: int) -> None:
        """An empty sequence shares the first `cells` of another."""
        assert target not in self._held, "a fork begins empty"
        assert cells <= self.held(source), "a fork cannot share what is not there"
        self._split(source, cells)
        shared, count = [], 0
        for segment in self._held[source]:
            if count == cells:
                break
            segment.holders += 1
            count += segment.cells
            shared.append(segment)
        if shared:
            self._held[target] = shared

    def drop(self, seq_id: int) -> None:
        """A sequence forgets everything."""
        for segment in self._held.pop(seq_id, ()):
            segment.holders -= 1
            if segment.holders == 0:
                self.used -= segment.cells

    def check(self) -> None:
        """The book agrees with itself. Raises AssertionError."""
        holders: dict[int, int] = {}
        segments: dict[int, _Segment] = {}
        for held in self._held.values():
            for segment in held:
                holders[id(segment)] = holders.get(id(segment), 0) + 1
                segments[id(segment)] = segment
        assert all(segment.cells > 0 for segment in segments.values())
        assert all(segments[key].holders == count for key, count in holders.items())
        assert sum(segment.cells for segment in segments.values()) == self.used

    def _split(self, seq_id: int, cells: int) -> None:
        """Let a segment of this sequence end exactly behind its first `cells`, for all who hold it."""
        count = 0
        for segment in self._held.get(seq_id, ()):
            if count < cells < count + segment.cells:
                rest = _Segment(count + segment.cells - cells, segment.holders)
                segment.cells -= rest.cells
                for held in self._held.values():
                    for index, other in enumerate(held):
                        if other is segment:
                            held.insert(index + 1, rest)
                            break
                return
            count += segment.cells


class KVCacheManager:
    """Sequence ids and cells as budgets. It touches no backend: what is to be done there collects in `take_ops`.

    A sequence that ends leaves its cells as an idle prefix, least recently used first to go. Without `keep_prefixes`,
    or where the model keeps one state a sequence (`limits.forks` is False), nothing is kept or shared.
    """

    def __init__(self, limits: BackendLimits, *, keep_prefixes: bool) -> None:
        self._limits = limits
        self._keeps = keep_prefixes and limits.forks
        self._ops: list[KVOp] = []
        self._free_ids = list(range(limits.n_seq_max - 1, -1, -1))
        self._idle: OrderedDict[int, Prefix] = OrderedDict()
        self._index = PrefixIndex()
        self.cells = CellBook()

    @property
    def used(self) -> int:
        """Cells in use."""
        return self.cells.used

    @property
    def room(self) -> int:
        """Cells that are free."""
        return self._limits.n_ctx - self.cells.used

    @property
    def idle_ids(self) -> tuple[int, ...]:
        """Ids of idle prefixes, least recently used first."""
        return tuple(self._idle)

    @property
    def idle_cells(self) -> int:
        """Cells that idle prefixes hold."""
        return self.cells.held_by(self._idle)

    def take_ops(self) -> tuple[KVOp, ...]:
        """What has to be done on the backend since the last call, in order."""
        ops, self._ops = tuple(self._ops), []
        return ops

    def match(self, wanted: Prefix) -> Match | None:
        """Who holds, or is about to fill, the longest beginning of this prompt."""
        return self._index.match(wanted) if self._keeps else None

    def make_room(self, cells: int, keep: Prefix | None = None) -> bool:
        """Evict idle prefixes until an id and so many cells are free; False when only `keep` is left to evict."""
        while not self._free_ids or self.room < cells:
            victim = next((prefix for prefix in self._idle.values() if prefix is not keep), None)
            if victim is None:
                return False
            self.evict(victim)
        return True

    def start(self, prefix: Prefix, source: Prefix | None, ready: int) -> None:
        """Give a prefix an id and, from `source`, its first `ready` units; `prefix.units` are those then."""
        seq_id = self._free_ids.pop()
        shared = prefix.planned[:ready]
        cells = cells_of(shared)
        if source is None or not cells:
            shared = prefix.planned[:1]  # the salt, which takes no cell
        else:
            self._ops.append(Fork(source.seq_id, seq_id, positions_of(shared)))
            self.cells.fork(source.seq_id, seq_id, cells)
            if source.seq_id in self._idle:
                self._idle.move_to_end(source.seq_id)
        prefix.seq_id, prefix.units = seq_id, list(shared)
        if self._keeps:
            self._index.add(prefix)

    def retire(self, prefix: Prefix) -> None:
        """A sequence ended: keep its cells, unless part of an image is among them, which is no unit."""
        cells = cells_of(prefix.units)
        if not (self._keeps and cells and self.cells.held(prefix.seq_id) == cells):
            self.free(prefix)
            return
        self._index.remove(prefix)
        prefix.retire()
        self._index.add(prefix)
        self._idle[prefix.seq_id] = prefix
        for other in self._index.contained_in(prefix):
            self.evict(other)

    def evict(self, prefix: Prefix) -> None:
        """Forget an idle prefix."""
        del self._idle[prefix.seq_id]
        self.free(prefix)

    def evict_oldest(self) -> bool:
        """Forget the idle prefix that was used longest ago; False when there is none."""
        if not self._idle:
            return False
        self.evict(next(iter(self._idle.values())))
        return True

    def free(self, prefix: Prefix) -> None:
        """Forget what a sequence holds."""
        self._index.remove(prefix)
        self.cells.drop(prefix.seq_id)
        self._free_ids.append(prefix.seq_id)
        self._ops.append(Forget(prefix.seq_id))

    def expected_positions(self) -> dict[int, int]:
        """The last position of each sequence id while no sequence runs: -1 for all but idle prefixes."""
        held = {prefix.seq_id: last_position_of(prefix.units) for prefix in self._idle.values()}
        return {seq_id: held.get(seq_id, -1) for seq_id in range(self._limits.n_seq_max)}

    def check(self, running: Iterable[int]) -> None:
        """The counts agree with each other and with the ids that run. Raises AssertionError."""
        self.cells.check()
        assert self.used <= self._limits.n_ctx, "more cells are counted than there are"
        ids = [*running, *self._idle]
        assert len(ids) == len(set(ids)), "an id is used twice"
        assert sorted(ids + self._free_ids) == list(range(self._limits.n_seq_max)), "an id was lost"
