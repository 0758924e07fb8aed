"""Whole questions instead of pieces: a finalist and the untuned settings answer short forms of W1 and W4 in turn."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from opsin.bench.measure import figures, warm_up, why_void
from opsin.bench.play import draw_pictures, play
from opsin.bench.workload import Ask, Driver, Workload
from opsin.core.errors import EngineError
from opsin.tune.search import Cost, Ratio, ratio_of

ROUNDS = 5
_ALONE = 2


@dataclass(frozen=True, slots=True)
class Final:
    """Times of the finalist over the untuned ones, and the untuned: seconds of a question alone, and of one of many."""

    latency: Ratio
    batch: Ratio
    untuned: Cost


def workloads(sequences: int) -> tuple[Workload, Workload]:
    """New pictures one after another, and as many at once as the engine answers (8 at most)."""
    at_once = min(8, sequences)
    return (
        Workload("T1", f"{_ALONE} new pictures, one after another", tuple(Ask(i) for i in range(_ALONE))),
        Workload("T4", f"{at_once} new pictures, at once", tuple(Ask(i) for i in range(at_once)), at_once=True),
    )


def play_final(
    untuned: Driver,
    other: Driver,
    played: Sequence[Workload],
    *,
    noise: float,
    rounds: int = ROUNDS,
    first: int = 0,
    may_go_on: Callable[[float], bool] = lambda _: True,
    now: Callable[[], float] = time.monotonic,
) -> Final:
    """Both play in turn, every second round the other way round, on equal pictures, numbered from `first`.

    `played` are a workload of questions one after another and one of questions at once. `may_go_on` is asked before
    each round but the first, with the seconds that the longest one took. Raises EngineError when a round counts
    for nothing.
    """
    sides = (untuned, other)
    for driver in sides:
        warm_up(driver, played[0])
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    longest = 0.0
    for turn in range(rounds):
        if turn and not may_go_on(longest):
            break
        began = now()
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            for kind, workload in enumerate(played):
                times[side, kind].append(_seconds(sides[side], workload, first + turn))
        longest = max(longest, now() - began)
    latency, batch = (ratio_of(times[1, kind], times[0, kind], noise) for kind in (0, 1))
    return Final(latency, batch, Cost(*(median(times[0, kind]) / len(played[kind].asks) for kind in (0, 1))))


def _seconds(driver: Driver, workload: Workload, turn: int) -> float:
    traces = play(driver, workload, draw_pictures(workload, turn))
    void = why_void(workload, traces)
    if void is not None:
        raise EngineError(f"{workload.title} count for nothing, since {void}: tune again.")
    return figures(workload, traces).total_s
