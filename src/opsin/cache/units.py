"""A prompt as the key of what was computed for it: one unit a token, one unit a whole picture chunk.

A picture is one unit, so no prefix can ever end inside one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from opsin.core.layout import ImageRun, Run


@dataclass(frozen=True, slots=True)
class ImageUnit:
    """A picture chunk: its embedding's identity by content, the cells it takes, and the positions.

    `last_pos` is the position of its last cell from its first: under M-RoPE all cells of a picture share one. The
    other values decide it, so it is not compared.
    """

    identity: str
    n_tokens: int
    n_pos: int
    last_pos: int = field(default=0, compare=False)


Unit = int | str | ImageUnit
"""A token, a salt (it takes no cell), or a picture chunk."""


def unit_of(run: ImageRun) -> ImageUnit:
    """The unit of a picture chunk."""
    return ImageUnit(run.identity, run.n_tokens, run.n_pos, run.last_pos)


def units_of(runs: Iterable[Run], salt: str = "") -> tuple[Unit, ...]:
    """The units of a prompt, behind its salt: prompts of different salts share nothing."""
    units: list[Unit] = [salt]
    for run in runs:
        if isinstance(run, ImageRun):
            units.append(unit_of(run))
        else:
            units.extend(run.tokens)
    return tuple(units)


def shared_units(one: Sequence[Unit], other: Sequence[Unit]) -> int:
    """How many units two prompts begin with in common."""
    low, high = 0, min(len(one), len(other))
    # Whole slices are compared in C; doubling would look at each unit more than twice, halving does not.
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


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
