"""From traces to figures: first tokens, time a token, the longest pause, and medians over runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import median

from opsin.bench.play import Trace, draw_pictures, play
from opsin.bench.workload import Driver, Workload
from opsin.core.answer import Usage

WARM_UP = 10_000
"""Number of a run whose pictures no measured run has."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One run, or the medians of several. Milliseconds, but `total_s` in seconds.

    `first_tokens_ms` has one for each question, in the workload's order. `first_token_ms` and `token_ms` are medians
    over the answers; a token's time is that between first and last piece of text, over the tokens after the first.
    `longest_pause_ms` lies between two pieces of one answer.
    """

    total_s: float
    first_token_ms: float
    first_token_max_ms: float
    token_ms: float
    longest_pause_ms: float
    first_tokens_ms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """A workload's runs, and how many questions failed in them.

    `void` says why its figures count for nothing; then there is no median.
    """

    workload: Workload
    runs: tuple[Figures, ...]
    usages: tuple[Usage, ...]
    void: str | None = None
    failed: int = 0

    @property
    def median(self) -> Figures | None:
        """The median of each figure over the runs."""
        if self.void is not None or not self.runs:
            return None
        single = [f.name for f in fields(Figures) if f.name != "first_tokens_ms"]
        return Figures(
            **{name: median(getattr(run, name) for run in self.runs) for name in single},
            first_tokens_ms=tuple(map(median, zip(*(run.first_tokens_ms for run in self.runs), strict=True))),
        )


def measure_workload(
    driver: Driver, workload: Workload, *, runs: int = 3, tell: Callable[[str], None] = lambda _: None
) -> Measured:
    """Play a workload `runs` times, with new pictures each time. Raises what the driver raises."""
    return measure_in_turn({"": driver}, workload, runs=runs, tell=tell)[""]


def measure_in_turn(
    drivers: Mapping[str, Driver],
    workload: Workload,
    *,
    runs: int = 3,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Measured]:
    """Play a workload `runs` times on each of several, one after another within each run, on equal pictures.

    Every second run goes the other way round, so that nobody always comes after the same other. A driver whose run is
    void is left out from then on. Raises what a driver raises.
    """
    measured = {name: Measured(workload, (), ()) for name in drivers}
    for run in range(runs):
        pictures = draw_pictures(workload, run)
        names = list(drivers)[:: 1 if run % 2 == 0 else -1]
        for name in names:
            if measured[name].void is None:
                tell(" ".join(filter(None, (f"{workload.name}, run {run + 1} of {runs}", name and f"on {name}"))))
                measured[name] = _with_run(measured[name], play(drivers[name], workload, pictures))
    return measured


def _with_run(before: Measured, traces: Sequence[Trace]) -> Measured:
    workload = before.workload
    usages = tuple(trace.usage for trace in traces)
    failed = before.failed + sum(trace.failed is not None for trace in traces)
    void = why_void(workload, traces)
    runs = before.runs if void is not None else (*before.runs, figures(workload, traces))
    return Measured(workload, runs, usages, void, failed)


def warm_up(driver: Driver, workload: Workload) -> None:
    """Ask one question whose answer nobody counts: memory is touched and graphs are built before the clock runs."""
    pictures = draw_pictures(workload, WARM_UP)
    for _ in driver.ask(pictures[0], workload.asks[0].question, 4):
        pass


def why_void(workload: Workload, traces: Sequence[Trace]) -> str | None:
    """Why a run counts for nothing: failed questions, answers of another length, or no text. None: it counts."""
    failed = [trace.failed for trace in traces if trace.failed is not None]
    if failed:
        return f"{len(failed)} of {len(traces)} questions failed: {failed[0]}"
    for ask, trace in zip(workload.asks, traces, strict=True):
        counted = trace.usage.completion_tokens
        if counted != ask.max_tokens:
            return f"{counted} tokens were answered where {ask.max_tokens} were asked for"
        if not trace.pieces:
            return "an answer had no text"
    return None


def figures(workload: Workload, traces: Sequence[Trace]) -> Figures:
    """The figures of one run that counts."""
    first = [trace.pieces[0] - trace.sent for trace in traces]
    watched = traces if workload.stream is None else [traces[workload.stream]]
    return Figures(
        total_s=max(trace.ended for trace in traces) - min(trace.sent for trace in traces),
        first_token_ms=median(first) * 1e3,
        first_token_max_ms=max(first) * 1e3,
        token_ms=median(_token_time(trace) for trace in traces) * 1e3,
        longest_pause_ms=max(longest_gap(trace.pieces) for trace in watched) * 1e3,
        first_tokens_ms=tuple(time * 1e3 for time in first),
    )


def longest_gap(times: Sequence[float]) -> float:
    """The longest time between two that follow each other; 0 for fewer than two."""
    return max((b - a for a, b in pairwise(times)), default=0.0)


def _token_time(trace: Trace) -> float:
    return (trace.pieces[-1] - trace.pieces[0]) / max(1, trace.usage.completion_tokens - 1)
