"""Runs workloads on drivers: times of each answer, statistics of each run, medians over runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import median

from opsin.bench.workloads import Ask, Driver, RequestFailed, Workload, images_of
from opsin.core.answer import Usage

WARM_UP_RUN = 10_000
"""Number of a run whose images no measured run has."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer: when it was asked for, when each piece of text came, when it ended; in seconds.

    `failed` is the server's error if there was no complete answer.
    """

    sent: float
    pieces: tuple[float, ...]
    ended: float
    usage: Usage
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """One run, or the medians of several; in milliseconds, except `total_s`.

    `first_tokens_ms` has one value per question, in the workload's order, `first_token_max_ms` is their maximum. The
    other figures are those of the workload's `stream` if it has one, else of all answers: the median first token, the
    median time per token after the first, and the longest pause between two pieces of one answer.
    """

    total_s: float
    first_token_ms: float
    first_token_max_ms: float
    token_ms: float
    longest_pause_ms: float
    first_tokens_ms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """The runs of one workload. `invalid` says why they must not be used; `failed` counts failed questions."""

    workload: Workload
    runs: tuple[Stats, ...] = ()
    usages: tuple[Usage, ...] = ()
    invalid: str | None = None
    failed: int = 0

    @property
    def median(self) -> Stats | None:
        """The median of each figure over the runs; None if the result is invalid."""
        if self.invalid is not None or not self.runs:
            return None
        single = [f.name for f in fields(Stats) if f.name != "first_tokens_ms"]
        return Stats(
            **{name: median(getattr(run, name) for run in self.runs) for name in single},
            first_tokens_ms=tuple(map(median, zip(*(run.first_tokens_ms for run in self.runs), strict=True))),
        )


def run_workload(driver: Driver, workload: Workload, images: Sequence[bytes]) -> list[Timing]:
    """Ask all questions, a thread each if `at_once`; timings in the same order. Raises what the driver raises."""
    start = time.perf_counter()

    def run(ask: Ask) -> Timing:
        if workload.at_once:
            time.sleep(max(0.0, start + ask.at - time.perf_counter()))
        sent = time.perf_counter()
        stream = driver.ask(images[ask.image], ask.question, ask.max_tokens)
        pieces: list[float] = []
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                return Timing(sent, tuple(pieces), time.perf_counter(), end.value)
            except RequestFailed as error:
                return Timing(sent, tuple(pieces), time.perf_counter(), Usage(), str(error))

    if not workload.at_once:
        return [run(ask) for ask in workload.asks]
    with ThreadPoolExecutor(len(workload.asks), thread_name_prefix="opsin-bench") as pool:
        return list(pool.map(run, workload.asks))


def measure_in_turn(
    drivers: Mapping[str, Driver],
    workload: Workload,
    *,
    runs: int = 3,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Result]:
    """Run a workload `runs` times on each driver, in turn within each run, with the same images.

    Every second run goes through the drivers backwards, so that none always follows the same other one. A driver whose
    result is invalid is left out from then on. Raises what a driver raises.
    """
    results = {name: Result(workload) for name in drivers}
    for run in range(runs):
        images = images_of(workload, run)
        for name in list(drivers)[:: 1 if run % 2 == 0 else -1]:
            if results[name].invalid is None:
                tell(f"{workload.name}, run {run + 1} of {runs} on {name}")
                results[name] = _with_run(results[name], run_workload(drivers[name], workload, images))
    return results


def _with_run(before: Result, timings: Sequence[Timing]) -> Result:
    workload = before.workload
    invalid = invalid_reason(workload, timings)
    return Result(
        workload,
        before.runs if invalid is not None else (*before.runs, stats_of(workload, timings)),
        tuple(timing.usage for timing in timings),
        invalid,
        before.failed + sum(timing.failed is not None for timing in timings),
    )


def warm_up(driver: Driver, workload: Workload) -> None:
    """Ask one question that is not measured: memory is touched and graphs are built before the clock runs."""
    for _ in driver.ask(images_of(workload, WARM_UP_RUN)[0], workload.asks[0].question, 4):
        pass


def invalid_reason(workload: Workload, timings: Sequence[Timing]) -> str | None:
    """Why a run is invalid: failed questions, answers of another length, or no text. None: it is valid."""
    failed = [timing.failed for timing in timings if timing.failed is not None]
    if failed:
        return f"{len(failed)} of {len(timings)} questions failed: {failed[0]}"
    for ask, timing in zip(workload.asks, timings, strict=True):
        counted = timing.usage.completion_tokens
        if counted != ask.max_tokens:
            return f"an answer has {counted} tokens instead of {ask.max_tokens}"
        if not timing.pieces:
            return "an answer has no text"
    return None


def stats_of(workload: Workload, timings: Sequence[Timing]) -> Stats:
    """The figures of one valid run."""
    watched = timings if workload.stream is None else [timings[workload.stream]]
    first = [timing.pieces[0] - timing.sent for timing in timings]
    return Stats(
        total_s=max(timing.ended for timing in timings) - min(timing.sent for timing in timings),
        first_token_ms=median(timing.pieces[0] - timing.sent for timing in watched) * 1e3,
        first_token_max_ms=max(first) * 1e3,
        token_ms=median(_token_seconds(timing) for timing in watched) * 1e3,
        longest_pause_ms=max(longest_gap(timing.pieces) for timing in watched) * 1e3,
        first_tokens_ms=tuple(seconds * 1e3 for seconds in first),
    )


def longest_gap(times: Sequence[float]) -> float:
    """The longest time between two neighbours; 0 for fewer than two."""
    return max((b - a for a, b in pairwise(times)), default=0.0)


def _token_seconds(timing: Timing) -> float:
    return (timing.pieces[-1] - timing.pieces[0]) / max(1, timing.usage.completion_tokens - 1)
