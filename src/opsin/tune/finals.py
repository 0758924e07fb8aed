"""Whole questions instead of pieces: finalists answer short forms of W1 and W4 in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from opsin.bench.engine_driver import EngineDriver
from opsin.bench.measure import figures, warm_up, why_void
from opsin.bench.play import draw_pictures, play
from opsin.bench.workload import Ask, Driver, Workload
from opsin.core.errors import EngineError
from opsin.tune.pareto import Point
from opsin.tune.rig import Rig
from opsin.tune.search import Choice, ratio_of

ROUNDS = 5
_ALONE = 2
_UNKNOWN = 0.1


def workloads(sequences: int) -> tuple[Workload, Workload]:
    """New pictures one after another, and as many at once as the engine answers (8 at most)."""
    at_once = min(8, sequences)
    return (
        Workload("T1", f"{_ALONE} new pictures, one after another", tuple(Ask(i) for i in range(_ALONE))),
        Workload("T4", f"{at_once} new pictures, at once", tuple(Ask(i) for i in range(at_once)), at_once=True),
    )


@dataclass(slots=True)
class _Runs:
    alone: list[float] = field(default_factory=list)
    at_once: list[float] = field(default_factory=list)


def measure_finals(
    drivers: Mapping[str, Driver],
    choices: Mapping[str, Choice],
    played: Sequence[Workload],
    *,
    rounds: int = ROUNDS,
    may_go_on: Callable[[float], bool] = lambda _: True,
    now: Callable[[], float],
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Point, ...]:
    """Points of all finalists, the first of which the others are compared with; every second round goes backwards.

    `played` are a workload of questions one after another and one of questions at once. `may_go_on` is asked with the
    seconds that another round will take. Raises EngineError when not one round could be played.
    """
    runs = {name: _Runs() for name in drivers}
    for driver in drivers.values():
        warm_up(driver, played[0])
    done = 0
    for turn in range(rounds):
        began = now()
        for name in list(drivers)[:: 1 if turn % 2 == 0 else -1]:
            tell(f"{name}, round {turn + 1}")
            for workload, into in zip(played, (runs[name].alone, runs[name].at_once), strict=True):
                into.append(_seconds(drivers[name], workload, turn))
        done = turn + 1
        if not may_go_on(now() - began):
            break
    if not done:
        raise EngineError("There was no time for a single round: give more --minutes.")
    first = runs[next(iter(drivers))]
    one, many = (len(workload.asks) for workload in played)
    return tuple(
        Point(
            name=name,
            latency_s=median(run.alone) / one,
            answers_s=many / median(run.at_once),
            latency=ratio_of(run.alone, first.alone, _UNKNOWN),
            batch=ratio_of(run.at_once, first.at_once, _UNKNOWN),
            choice=choices[name],
        )
        for name, run in runs.items()
    )


def _seconds(driver: Driver, workload: Workload, turn: int) -> float:
    traces = play(driver, workload, draw_pictures(workload, turn))
    void = why_void(workload, traces)
    if void is not None:
        raise EngineError(f"A round of {workload.name} counts for nothing, since {void}: tune again.")
    return figures(workload, traces).total_s


def driver_of(rig: Rig) -> EngineDriver:
    """Asks the rig's engine."""
    return EngineDriver(rig.engine, rig.prompts)
