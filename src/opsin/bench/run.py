"""Runs workloads on drivers: times of each answer, statistics of each run, medians over runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from statistics import median

from opsin.bench.workloads import Ask, Driver, RequestFailed, Workload, images_of
from opsin.core.answer import Usage

_WARM_UP_RUN = 10_000  # its images are those of no measured run


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

    `first_token_max_ms` is the slowest question's. The other figures are those of the workload's `stream` if it has
    one, else of all answers: the median first token, the median time per token after the first, and the longest pause
    between two pieces of one answer.
    """

    total_s: float
    first_token_ms: float
    first_token_max_ms: float
    token_ms: float
    longest_pause_ms: float


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
        return Stats(*(median(getattr(run, field.name) for run in self.runs) for field in fields(Stats)))

    def with_run(self, timings: Sequence[Timing]) -> Result:
        """The result with one more run, which makes it invalid if that is."""
        invalid = invalid_reason(self.workload, timings)
        return replace(
            self,
            runs=self.runs if invalid else (*self.runs, stats_of(self.workload, timings)),
            usages=tuple(timing.usage for timing in timings),
            invalid=invalid,
            failed=self.failed + sum(timing.failed is not None for timing in timings),
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
        usage, failed = Usage(), None
        try:
            while True:
                pieces.append(next(stream))
        except StopIteration as end:
            usage = end.value
        except RequestFailed as error:
            failed = str(error)
        return Timing(sent, tuple(pieces), time.perf_counter(), usage, failed)

    threads = len(workload.asks) if workload.at_once else 1
    with ThreadPoolExecutor(threads, thread_name_prefix="opsin-bench") as pool:
        return list(pool.map(run, workload.asks))


def measure_in_turn(
    drivers: Mapping[str, Driver],
    workload: Workload,
    *,
    runs: int = 3,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Result]:
    """Run a workload `runs` times on each driver, in turn with the same images, every second run backwards.

    A driver whose result is invalid is left out from then on. Raises what a driver raises.
    """
    results = {name: Result(workload) for name in drivers}
    for run in range(runs):
        images = images_of(workload, run)
        for name in list(drivers)[:: 1 if run % 2 == 0 else -1]:
            if results[name].invalid is None:
                tell(f"{workload.name}, run {run + 1} of {runs} on {name}")
                results[name] = results[name].with_run(run_workload(drivers[name], workload, images))
    return results


def warm_up(driver: Driver, workload: Workload) -> None:
    """Ask one question that is not measured: memory is touched and graphs are built before the clock runs."""
    for _ in driver.ask(images_of(workload, _WARM_UP_RUN)[0], workload.asks[0].question, 4):
        pass


def invalid_reason(workload: Workload, timings: Sequence[Timing]) -> str | None:
    """Why a run is invalid: failed questions, answers of another length, or no text. None: it is valid."""
    failed = [timing.failed for timing in timings if timing.failed is not None]
    if failed:
        return f"{len(failed)} of {len(timings)} questions failed: {failed[0]}"
    for ask, timing in zip(workload.asks, timings, strict=True):
        if timing.usage.completion_tokens != ask.max_tokens:
            return f"an answer has {timing.usage.completion_tokens} tokens instead of {ask.max_tokens}"
        if not timing.pieces:
            return "an answer has no text"
    return None


def stats_of(workload: Workload, timings: Sequence[Timing]) -> Stats:
    """The figures of one valid run."""
    watched = timings if workload.stream is None else [timings[workload.stream]]
    tokens = [(one.pieces[-1] - one.pieces[0]) / max(1, one.usage.completion_tokens - 1) for one in watched]
    return Stats(
        total_s=max(timing.ended for timing in timings) - min(timing.sent for timing in timings),
        first_token_ms=median(timing.pieces[0] - timing.sent for timing in watched) * 1e3,
        first_token_max_ms=max(timing.pieces[0] - timing.sent for timing in timings) * 1e3,
        token_ms=median(tokens) * 1e3,
        longest_pause_ms=max((b - a for timing in watched for a, b in pairwise(timing.pieces)), default=0.0) * 1e3,
    )
