"""Sequences of neighbouring ids are computed together where each has a memory of its own: who moves to close a gap."""

from __future__ import annotations

from collections.abc import Collection


def spread(ids: Collection[int]) -> int:
    """How many ids lie from the first to the last of these; 0 for none."""
    return max(ids) - min(ids) + 1 if ids else 0


def closing_move(running: Collection[int], n_ids: int) -> tuple[int, int] | None:
    """From which id to which one of the running sequences moves; None when their ids follow each other.

    The stretch that most of them are in already stays, so every move brings the others nearer to an end.
    """
    count, ids = len(running), set(running)
    if spread(ids) == count:
        return None
    stretches = (range(first, first + count) for first in range(n_ids - count + 1))
    stretch = max(stretches, key=lambda stretch: len(ids.intersection(stretch)))
    return max(ids.difference(stretch)), min(set(stretch) - ids)
