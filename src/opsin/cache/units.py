"""A prompt as the key of what was computed for it: one unit a token, one unit a whole picture chunk.

A picture is one unit, so no prefix can ever end inside one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opsin.core.layout import ImageRun, Run


@dataclass(frozen=True, slots=True)
class ImageUnit:
    """A picture chunk: its embedding's identity by content, the cells it takes, and the positions."""

    identity: str
    n_tokens: int
    n_pos: int


Unit = int | str | ImageUnit
"""A token, a salt (it takes no cell), or a picture chunk."""


def units_of(runs: Iterable[Run], salt: str = "") -> tuple[Unit, ...]:
    """The units of a prompt, behind its salt: prompts of different salts share nothing."""
    units: list[Unit] = [salt]
    for run in runs:
        if isinstance(run, ImageRun):
            units.append(ImageUnit(run.identity, run.n_tokens, run.n_pos))
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
