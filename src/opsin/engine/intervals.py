"""The story of a request's stages: which stage ran from when to when, in bounded memory."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from opsin.core.stages import Interval, Stage

FIRST, LONGEST = 32, 48
"""Intervals that are told apart: how the answer came to begin, and of the thousands behind that the long ones."""


@dataclass(slots=True)
class _Rest:
    """The short intervals of a stage."""

    start: float
    end: float
    seconds: float = 0.0
    count: int = 0


class Intervals:
    """Keeps the first and the longest intervals as they were, and the others of a stage as one. No time is lost."""

    def __init__(self) -> None:
        self._first: list[Interval] = []
        self._longest: list[tuple[float, float, float, Stage]] = []
        self._rest: dict[Stage, _Rest] = {}

    def add(self, stage: Stage, start: float, end: float) -> None:
        """The stage ran from `start` to `end`, in seconds; intervals never overlap, and empty ones are none."""
        seconds, longest = end - start, self._longest
        if seconds <= 0.0:
            return
        if len(self._first) < FIRST:
            self._first.append(Interval(stage, start, end, seconds))
            return
        if len(longest) < LONGEST:
            heapq.heappush(longest, (seconds, start, end, stage))
            return
        if seconds > longest[0][0]:
            seconds, start, end, stage = heapq.heapreplace(longest, (seconds, start, end, stage))
        rest = self._rest.get(stage)
        if rest is None:
            rest = self._rest[stage] = _Rest(start, end)
        if start < rest.start:  # noqa: PLR1730 - several times a token, and a call takes longer
            rest.start = start
        if end > rest.end:  # noqa: PLR1730 - likewise
            rest.end = end
        rest.seconds += seconds
        rest.count += 1

    def told(self) -> tuple[Interval, ...]:
        """All of it, by beginning."""
        told = self._first + [Interval(stage, start, end, seconds) for seconds, start, end, stage in self._longest]
        told += [Interval(stage, rest.start, rest.end, rest.seconds, rest.count) for stage, rest in self._rest.items()]
        return tuple(sorted(told, key=lambda interval: interval.start))
