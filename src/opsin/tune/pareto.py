"""Finalists, which of them nobody beats, and which one a profile takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from opsin.tune.search import LEAST_GAIN, Choice, Ratio

Profile = Literal["interactive", "throughput"]
GIVEN_UP = 0.05
"""How much worse than untuned the other figure may become, as a share: a profile favours one and ruins none."""
_EVEN = Ratio(1.0, 0.0)


@dataclass(frozen=True, slots=True)
class Point:
    """A finalist, measured by whole questions: seconds of one asked alone, and answers a second of many at once.

    `latency` and `batch` are its times over the untuned ones (below 1: better), with their noise.
    """

    name: str
    latency_s: float
    answers_s: float
    latency: Ratio = _EVEN
    batch: Ratio = _EVEN
    choice: Choice = field(default_factory=dict)

    def beats(self, other: Point) -> bool:
        """Whether it is as good in both figures and better in one."""
        as_good = self.latency_s <= other.latency_s and self.answers_s >= other.answers_s
        return as_good and (self.latency_s < other.latency_s or self.answers_s > other.answers_s)


def pareto(points: Sequence[Point]) -> tuple[Point, ...]:
    """Those that no other one beats, the quickest first."""
    front = [point for point in points if not any(other.beats(point) for other in points)]
    return tuple(sorted(front, key=lambda point: (point.latency_s, -point.answers_s)))


def pick(points: Sequence[Point], profile: Profile) -> Point:
    """The one that is best for a profile; the first, which is the untuned one, unless another wins beyond noise.

    Of those within the noise of the best, the one whose other figure is best.
    """
    mine, its_other = ("latency", "batch") if profile == "interactive" else ("batch", "latency")
    allowed = [
        point for point in points[1:] if getattr(point, mine).wins and getattr(point, its_other).value <= 1.0 + GIVEN_UP
    ]
    if not allowed:
        return points[0]
    best = min(getattr(point, mine).value for point in allowed)
    near = [p for p in allowed if getattr(p, mine).value <= best + max(LEAST_GAIN, getattr(p, mine).noise / 2)]
    return min(near, key=lambda point: (getattr(point, its_other).value, getattr(point, mine).value))
