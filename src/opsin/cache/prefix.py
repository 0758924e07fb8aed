"""Which sequence holds which beginning of a prompt, found by hashes of blocks.

A prompt is a list of units: a salt, then one unit a token and one unit a whole image chunk, so that no prefix can end
inside an image. Blocks end after the salt, after every image and after every `BLOCK` tokens; a block's hash covers all
units up to its end, as in vLLM's prefix caching, so a lookup costs the same for short and long prompts.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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


def unit_of(chunk: ImageChunk) -> ImageUnit:
    """The unit of an image chunk."""
    return ImageUnit(chunk.identity, chunk.n_tokens, chunk.n_pos, chunk.last_pos)


def units_of(chunks: Iterable[Chunk], salt: str = "") -> tuple[Unit, ...]:
    """The units of a prompt behind its salt: prompts of different salts share nothing."""
    units: list[Unit] = [salt]
    for chunk in chunks:
        if isinstance(chunk, ImageChunk):
            units.append(unit_of(chunk))
        else:
            units.extend(chunk.tokens)
    return tuple(units)


def cells_of(units: Iterable[Unit]) -> int:
    """KV cells that units take."""
    return sum(unit.n_tokens if isinstance(unit, ImageUnit) else isinstance(unit, int) for unit in units)


def positions_of(units: Iterable[Unit]) -> int:
    """Positions that units take; under M-RoPE fewer than cells."""
    return sum(unit.n_pos if isinstance(unit, ImageUnit) else isinstance(unit, int) for unit in units)


def last_position_of(units: Sequence[Unit]) -> int:
    """The last position that cells of these units have, -1 for none."""
    last = units[-1] if units else ""
    if isinstance(last, ImageUnit):
        return positions_of(units[:-1]) + last.last_pos
    return positions_of(units) - 1


class BlockHashes:
    """Hashes of a growing list of units at the ends of its blocks.

    `ends[i]` is how many units block `i` and all before it hold, `hashes[i]` names exactly those units, and `cells[i]`
    are the KV cells they take.
    """

    __slots__ = ("cells", "ends", "hashes")

    def __init__(self, units: Sequence[Unit] = ()) -> None:
        self.ends: list[int] = []
        self.hashes: list[bytes] = []
        self.cells: list[int] = []
        self.extend(units)

    def extend(self, units: Sequence[Unit]) -> None:
        """`units` are those that were hashed before, and more."""
        start = self.ends[-1] if self.ends else 0
        for end in range(start + 1, len(units) + 1):
            if end - start < BLOCK and isinstance(units[end - 1], int):
                continue
            before = self.hashes[-1] if self.hashes else b""
            block = tuple(units[start:end])
            self.hashes.append(hashlib.blake2b(before + repr(block).encode(), digest_size=16).digest())
            self.cells.append((self.cells[-1] if self.cells else 0) + cells_of(block))
            self.ends.append(end)
            start = end

    def cut(self, count: int) -> None:
        """Only the first `count` units are left."""
        keep = bisect_right(self.ends, count)
        del self.ends[keep:], self.hashes[keep:], self.cells[keep:]


@dataclass(slots=True, eq=False)
class Prefix:
    """What a sequence holds in the KV cache.

    `planned` are all units that its prompt will hold once it is filled, `units` those that are there now (they also
    grow with the answer). `idle` once its sequence has ended; then both are the same.
    """

    planned: tuple[Unit, ...] = ()
    seq_id: int = -1
    units: list[Unit] = field(default_factory=list)
    idle: bool = False
    blocks: BlockHashes = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = BlockHashes(self.planned)

    def planned_cells(self, count: int | None = None) -> int:
        """KV cells that the first `count` planned units take, or all of them; as quick for long prompts."""
        count = len(self.planned) if count is None else count
        index = bisect_right(self.blocks.ends, count) - 1
        start, cells = (self.blocks.ends[index], self.blocks.cells[index]) if index >= 0 else (0, 0)
        return cells + cells_of(self.planned[start:count])

    def retire(self) -> None:
        """Its sequence has ended: what is there is all there will be."""
        self.blocks.cut(len(self.units))
        self.blocks.extend(self.units)
        self.planned, self.idle = tuple(self.units), True

    def begins_with(self, other: Prefix) -> bool:
        """Whether all that `other` holds is the beginning of this one; both are idle."""
        count = len(other.blocks.hashes)
        if count > len(self.blocks.hashes) or other.blocks.hashes[-1:] != self.blocks.hashes[count - 1 : count]:
            return False
        end = other.blocks.ends[-1] if count else 0
        return self.planned[end : len(other.planned)] == other.planned[end:]


@dataclass(frozen=True, slots=True)
class Match:
    """The longest common beginning: `ready` units of it are there, `coming` will be when `prefix` is filled."""

    prefix: Prefix
    ready: int
    coming: int


class PrefixIndex:
    """Finds who holds the longest beginning of a prompt."""

    def __init__(self) -> None:
        self._holders: dict[bytes, dict[int, Prefix]] = {}

    def match(self, wanted: Prefix) -> Match | None:
        """Who shares the longest beginning, at least one unit behind the salt; ties go to who has more ready."""
        hashes, holders = wanted.blocks.hashes, self._holders
        # A block's hash covers everything before it, so known blocks are the first ones.
        known = bisect_left(range(len(hashes)), True, key=lambda index: hashes[index] not in holders)
        if known == 0:
            return None
        start = wanted.blocks.ends[known - 1]
        best: Match | None = None
        for prefix in holders[hashes[known - 1]].values():
            coming = start + _shared(wanted.planned[start : start + BLOCK], prefix.planned[start : start + BLOCK])
            ready = min(coming, len(prefix.units))
            if coming > 1 and (best is None or (coming, ready) > (best.coming, best.ready)):
                best = Match(prefix, ready, coming)
        return best

    def add(self, prefix: Prefix) -> None:
        """It can be found from now on, by all blocks that it has; call it again when it got more."""
        for name in prefix.blocks.hashes:
            self._holders.setdefault(name, {})[id(prefix)] = prefix

    def remove(self, prefix: Prefix) -> None:
        """Its cells are gone; removing it twice does no harm."""
        for name in prefix.blocks.hashes:
            held = self._holders.get(name)
            if held is not None and held.pop(id(prefix), None) is not None and not held:
                del self._holders[name]

    def contained_in(self, prefix: Prefix) -> list[Prefix]:
        """Other idle prefixes that this idle one begins with: it serves whoever would ask for them."""
        first = self._holders.get(prefix.blocks.hashes[0], {}) if prefix.blocks.hashes else {}
        return [other for other in first.values() if other.idle and other is not prefix and prefix.begins_with(other)]


def _shared(one: Sequence[Unit], other: Sequence[Unit]) -> int:
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
