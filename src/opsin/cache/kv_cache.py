"""Who holds which cells of the KV cache, and what is found in it again.

A prompt is a list of units: a salt, then one unit a token and one unit a whole image chunk, so that no prefix can end
inside an image. Blocks end after the salt, after every image and after every `BLOCK` tokens; a block's hash covers all
units up to its end, as in vLLM's prefix caching, so a lookup costs the same for short and long prompts.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from opsin.core.backend import BackendLimits
from opsin.core.request import Chunk, ImageChunk

BLOCK = 16
"""Tokens of a block."""


@dataclass(frozen=True, slots=True)
class ImageUnit:
    """An image chunk: the identity of its embedding, its KV cells, and its positions.

    `last_pos` is the position of its last cell counted from its first: under M-RoPE all cells of an image share one.
    """

    identity: str
    n_tokens: int
    n_pos: int
    last_pos: int = field(default=0, compare=False)


Unit = int | str | ImageUnit
"""A token, a salt (which takes no cell), or an image chunk."""


def units_of(chunks: Iterable[Chunk], salt: str = "") -> list[Unit]:
    """The units of a prompt behind its salt: prompts of different salts share nothing."""
    units: list[Unit] = [salt]
    for chunk in chunks:
        if isinstance(chunk, ImageChunk):
            units.append(ImageUnit(chunk.identity, chunk.n_tokens, chunk.n_pos, chunk.last_pos))
        else:
            units.extend(chunk.tokens)
    return units


class Prefix:
    """What a sequence holds in the KV cache, or will hold once its prompt is filled.

    The first `ready` of its `units` are there; they grow with the answer. `hashes[i]` names all units up to `ends[i]`,
    the end of a block. `swapped` once what it holds is to lie in main memory instead, as the backend's `saved`.
    """

    __slots__ = ("_images", "ends", "hashes", "ready", "saved", "seq_id", "swapped", "units")

    def __init__(self, units: Iterable[Unit] = ("",)) -> None:
        self.units = list(units)
        self.ready = 0
        self.seq_id = -1
        self.swapped = False
        self.saved: object = None
        self.ends: list[int] = []
        self.hashes: list[bytes] = []
        self._images = [(index, unit) for index, unit in enumerate(self.units) if isinstance(unit, ImageUnit)]
        self._hash()

    def _hash(self) -> None:
        """Hash the blocks behind the last one that has a hash."""
        start = self.ends[-1] if self.ends else 0
        for end in range(start + 1, len(self.units) + 1):
            if end - start < BLOCK and isinstance(self.units[end - 1], int):
                continue
            before = self.hashes[-1] if self.hashes else b""
            block = repr(self.units[start:end]).encode()
            self.hashes.append(hashlib.blake2b(before + block, digest_size=16).digest())
            self.ends.append(end)
            start = end

    def cells(self, count: int) -> int:
        """KV cells that the first `count` units take; as quick for long prompts."""
        return max(0, count - 1) + sum(image.n_tokens - 1 for index, image in self._images if index < count)

    def positions(self, count: int) -> int:
        """Positions that the first `count` units take; under M-RoPE fewer than cells."""
        return max(0, count - 1) + sum(image.n_pos - 1 for index, image in self._images if index < count)

    @property
    def last_position(self) -> int:
        """The last position of the cells that are there, -1 for none."""
        last = self.units[self.ready - 1]
        if isinstance(last, ImageUnit):
            return self.positions(self.ready - 1) + last.last_pos
        return self.positions(self.ready) - 1

    def retire(self) -> None:
        """Its sequence has ended: what is there is all there will be."""
        del self.units[self.ready :]
        keep = bisect_right(self.ends, self.ready)
        del self.ends[keep:], self.hashes[keep:]
        self._hash()

    def begins_with(self, other: Prefix) -> bool:
        """Whether all that `other` holds is the beginning of this one; both have ended."""
        count, end = len(other.ends), other.ends[-1]
        same = self.hashes[count - 1 : count] == other.hashes[-1:]
        return same and self.units[end : len(other.units)] == other.units[end:]


class Match(NamedTuple):
    """The longest common beginning: `ready` units of it are there, `coming` will be when `prefix` is filled."""

    prefix: Prefix
    ready: int
    coming: int


class PrefixIndex:
    """Finds who holds the longest beginning of a prompt."""

    def __init__(self) -> None:
        self._holders: dict[bytes, dict[int, Prefix]] = {}

    def match(self, wanted: Prefix) -> Match | None:
        """Who shares the longest beginning, at least one unit behind the salt.

        Ties go to who has more ready, then to who is in the cache.
        """
        hashes, holders = wanted.hashes, self._holders
        # A block's hash covers everything before it, so known blocks are the first ones.
        known = bisect_left(range(len(hashes)), True, key=lambda index: hashes[index] not in holders)
        if known == 0:
            return None
        start = wanted.ends[known - 1]
        behind = wanted.units[start : start + BLOCK]
        matches = []
        for prefix in holders[hashes[known - 1]].values():
            pairs = zip(behind, prefix.units[start : start + BLOCK], strict=False)
            coming = start + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            matches.append(Match(prefix, min(coming, prefix.ready), coming))
        best = max(matches, key=lambda match: (match.coming, match.ready, not match.prefix.swapped))
        return best if best.coming > 1 else None

    def add(self, prefix: Prefix) -> None:
        """It can be found from now on, by all blocks that it has."""
        for name in prefix.hashes:
            self._holders.setdefault(name, {})[id(prefix)] = prefix

    def remove(self, prefix: Prefix) -> None:
        """Its cells are gone; removing it twice does no harm."""
        for name in prefix.hashes:
            held = self._holders.get(name)
            if held is not None and held.pop(id(prefix), None) is not None and not held:
                del self._holders[name]


class CellBook:
    """Counts cells by sequence id. A fork shares cells, so what sequences hold adds up to more than is used.

        sequence 0:  [ 600, shared by 3 ][ 12 ]
        sequence 1:  [ 600, the same    ][ 9 ]          used: 600 + 12 + 9 + 20
        sequence 2:  [ 600, the same    ][ 20 ]

    Two sequences share their first cells and no others, so one number for each pair says all.
    """

    def __init__(self) -> None:
        self._held: dict[int, int] = {}
        self._shared: dict[int, dict[int, int]] = {}
        self.used = 0

    def held(self, seq_id: int) -> int:
        """Cells a sequence sees, shared ones included."""
        return self._held.get(seq_id, 0)

    def held_by(self, seq_ids: Iterable[int]) -> int:
        """Cells that at least one of these sequences sees."""
        seen: set[int] = set()
        total = 0
        for seq_id in seq_ids:
            shared = self._shared.get(seq_id, {}).items()
            total += self.held(seq_id) - max((cells for other, cells in shared if other in seen), default=0)
            seen.add(seq_id)
        return total

    def own(self, seq_id: int) -> int:
        """Cells that no other sequence sees."""
        return self.held(seq_id) - max(self._shared.get(seq_id, {}).values(), default=0)

    def append(self, seq_id: int, cells: int) -> None:
        """A sequence took new cells at its end."""
        self._held[seq_id] = self._held.get(seq_id, 0) + cells
        self.used += cells

    def fork(self, source: int, target: int, cells: int) -> None:
        """An empty sequence shares the first `cells` of another, and with it what that one shares of these."""
        assert target not in self._held, "a fork begins empty"
        assert 0 < cells <= self.held(source), "a fork cannot share what is not there"
        self._held[target] = cells
        shared = {other: min(cells, count) for other, count in self._shared.get(source, {}).items()} | {source: cells}
        self._shared[target] = shared
        for other, count in shared.items():
            self._shared.setdefault(other, {})[target] = count

    def drop(self, seq_id: int) -> None:
        """A sequence forgets everything."""
        self.used -= self.own(seq_id)
        shared, _ = self._shared.pop(seq_id, {}), self._held.pop(seq_id, 0)
        for other in shared:
            del self._shared[other][seq_id]

    def check(self) -> None:
        """The book agrees with itself. Raises AssertionError."""
        assert self.used == self.held_by(self._held), "cells were lost"


@dataclass(frozen=True, slots=True)
class Forget:
    """Free the cells that only this sequence id holds."""

    seq_id: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Let `seq_id`, which is empty, share positions [0, end) of `source`."""

    seq_id: int
    source: int
    end: int


@dataclass(frozen=True, slots=True)
class SwapOut:
    """Copy all that `seq_id` holds into `prefix.saved`, and free its cells."""

    seq_id: int
    prefix: Prefix


@dataclass(frozen=True, slots=True)
class SwapIn:
    """Give `seq_id`, which is empty, positions [0, end) of what was swapped out of `source`."""

    seq_id: int
    source: Prefix
    end: int


KVOp = Forget | Fork | SwapOut | SwapIn


class KVCacheManager:
    """Sequence ids and cells as budgets. It touches no backend: what is to be done there collects in `take_ops`.

    A sequence that ends leaves its cells as an idle prefix, least recently used first to go: into main memory, where
    `swap_cells` of the latest that went find room, or for ever. Without `keep_prefixes`, or where the model keeps one
    state a sequence (`limits.forks` is False), nothing is kept or shared.
    """

    def __init__(self, limits: BackendLimits, *, keep_prefixes: bool, swap_cells: int = 0) -> None:
        self._limits = limits
        self._keeps = keep_prefixes and limits.forks
        self.swap_cells = swap_cells if limits.swaps and self._keeps else 0
        self._ops: list[KVOp] = []
        self._free_ids = list(range(limits.n_seq_max - 1, -1, -1))
        self.index = PrefixIndex()
        self.idle: dict[int, Prefix] = {}
        self.swapped: list[Prefix] = []
        self.cells = CellBook()

    @property
    def room(self) -> int:
        """Cells that are free."""
        return self._limits.n_ctx - self.cells.used

    def take_ops(self) -> tuple[KVOp, ...]:
        """What has to be done on the backend since the last call, in order."""
        ops, self._ops = tuple(self._ops), []
        return ops

    def make_room(self, cells: int, keep: Prefix | None = None) -> bool:
        """Evict idle prefixes until an id and so many cells are free; False when only `keep` is left to evict."""
        while not self._free_ids or self.room < cells:
            if not self.evict_oldest(keep):
                return False
        return True

    def start(self, prefix: Prefix, source: Prefix | None, ready: int) -> None:
        """Give a prefix an id and, from `source`, its first `ready` units; `prefix.ready` says how many it has then."""
        prefix.seq_id, prefix.ready = self._free_ids.pop(), 1  # the salt, which takes no cell
        if source is not None and ready > 1:
            prefix.ready = ready
            self._take_from(source, prefix)
        if self._keeps:
            self.index.add(prefix)

    @property
    def spare_ids(self) -> int:
        """Sequence ids that are free."""
        return len(self._free_ids)

    def branch(self, prefix: Prefix) -> int:
        """A free id that shares all that a prefix holds, until `drop`."""
        seq_id = self._free_ids.pop()
        self._ops.append(Fork(seq_id, prefix.seq_id, prefix.positions(prefix.ready)))
        self.cells.fork(prefix.seq_id, seq_id, prefix.cells(prefix.ready))
        return seq_id

    def drop(self, seq_id: int) -> None:
        """Forget what an id holds, and give it back."""
        self._ops.append(Forget(seq_id))
        self._give_back(seq_id)

    def _take_from(self, source: Prefix, prefix: Prefix) -> None:
        cells, end = prefix.cells(prefix.ready), prefix.positions(prefix.ready)
        if source.swapped:
            self._ops.append(SwapIn(prefix.seq_id, source, end))
            self.cells.append(prefix.seq_id, cells)
            if source in self.swapped:  # what was swapped out meanwhile may have taken its place
                self.swapped.remove(source)
                self.swapped.append(source)
            return
        self._ops.append(Fork(prefix.seq_id, source.seq_id, end))
        self.cells.fork(source.seq_id, prefix.seq_id, cells)
        if source.seq_id in self.idle:
            self.idle[source.seq_id] = self.idle.pop(source.seq_id)

    def retire(self, prefix: Prefix) -> None:
        """A sequence ended: keep its cells, unless part of an image is among them, which is no unit."""
        cells = prefix.cells(prefix.ready)
        if not (self._keeps and cells and self.cells.held(prefix.seq_id) == cells):
            self.free(prefix)
            return
        self.index.remove(prefix)
        prefix.retire()
        self.index.add(prefix)
        # It serves whoever would ask for one that it begins with.
        for other in list(filter(prefix.begins_with, (*self.idle.values(), *self.swapped))):
            self.free(other)
        self.idle[prefix.seq_id] = prefix

    def park(self, prefix: Prefix) -> None:
        """Its sequence will come back: it waits in main memory."""
        self.retire(prefix)
        if prefix.seq_id in self.idle:
            self._evict(prefix)

    def evict_oldest(self, keep: Prefix | None = None) -> bool:
        """Evict the idle prefix that was used longest ago, but not `keep`; False when there is none."""
        victim = next((prefix for prefix in self.idle.values() if prefix is not keep), None)
        if victim is not None:
            self._evict(victim)
        return victim is not None

    def find(self, wanted: Prefix) -> Match | None:
        """Who shares the longest beginning. Idle prefixes that are of little use to it are swapped out before."""
        match = self.index.match(wanted)
        useful = match is not None and 2 * match.prefix.cells(match.ready) >= match.prefix.cells(match.prefix.ready)
        self.swap_out_idle(keep=match.prefix if match is not None and useful else None)
        return self.index.match(wanted)

    def swap_out_idle(self, keep: Prefix | None = None) -> None:
        """Idle prefixes make room for those that run, whose attention looks at their cells, too."""
        for prefix in list(self.idle.values()):
            if prefix is not keep and prefix.cells(prefix.ready) <= self.swap_cells:
                self._evict(prefix)

    def _evict(self, prefix: Prefix) -> None:
        cells, seq_id = prefix.cells(prefix.ready), prefix.seq_id
        if cells > self.swap_cells or self._mostly_held_elsewhere(prefix):
            self.free(prefix)
            return
        while sum(other.cells(other.ready) for other in self.swapped) + cells > self.swap_cells:
            self.free(self.swapped[0])
        self._ops.append(SwapOut(seq_id, prefix))
        self._give_back(seq_id)
        prefix.swapped, prefix.seq_id = True, -1
        self.swapped.append(prefix)

    def _mostly_held_elsewhere(self, prefix: Prefix) -> bool:
        """Whether another prefix holds three quarters of it: questions about one image differ in their ends only."""
        self.index.remove(prefix)
        match = self.index.match(prefix)
        self.index.add(prefix)
        return match is not None and 4 * prefix.cells(match.ready) >= 3 * prefix.cells(prefix.ready)

    def free(self, prefix: Prefix) -> None:
        """Forget what a sequence or an idle prefix holds."""
        self.index.remove(prefix)
        if prefix.swapped:
            self.swapped.remove(prefix)
            return
        self.drop(prefix.seq_id)

    def _give_back(self, seq_id: int) -> None:
        self.idle.pop(seq_id, None)
        self.cells.drop(seq_id)
        self._free_ids.append(seq_id)
        self._free_ids.sort(reverse=True)  # low ids first, so that those in use follow on each other

    def expected_positions(self) -> dict[int, int]:
        """The last position of each sequence id while no sequence runs: -1 for all but idle prefixes."""
        ids = range(self._limits.n_seq_max)
        return {seq_id: self.idle[seq_id].last_position if seq_id in self.idle else -1 for seq_id in ids}

    def check(self, running: Iterable[int]) -> None:
        """The counts agree with each other and with the ids that run. Raises AssertionError."""
        self.cells.check()
        assert self.cells.used <= self._limits.n_ctx, "more cells are counted than there are"
        ids = sorted([*running, *self.idle, *self._free_ids])
        assert ids == list(range(self._limits.n_seq_max)), "an id was lost, or is used twice"
