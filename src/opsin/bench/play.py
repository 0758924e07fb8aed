"""Plays a workload on a driver, a thread a question."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from opsin.bench.pictures import picture_file
from opsin.bench.workload import Ask, Driver, RequestFailed, Workload
from opsin.core.answer import Usage


@dataclass(frozen=True, slots=True)
class Trace:
    """One answer: when its question was sent, when each piece of text came, and when it ended; in seconds.

    `failed` is what the server said when there was no whole answer.
    """

    sent: float
    pieces: tuple[float, ...]
    ended: float
    usage: Usage
    failed: str | None = None


def draw_pictures(workload: Workload, run: int) -> list[bytes]:
    """The pictures of one run: no run has one that another run or another workload had."""
    base = (sum(workload.name.encode()) * 1000 + run) * 100
    return [picture_file(base + i, large=i in workload.large) for i in range(workload.pictures)]


def play(driver: Driver, workload: Workload, pictures: Sequence[bytes]) -> list[Trace]:
    """Send all questions as the workload says; their traces, in the same order. Raises what the driver raises."""
    start = time.perf_counter()
    if not workload.at_once:
        return [_one(driver, ask, pictures[ask.picture]) for ask in workload.asks]
    with ThreadPoolExecutor(len(workload.asks), thread_name_prefix="opsin-bench") as pool:
        waiting = [pool.submit(_timed, driver, ask, pictures[ask.picture], start) for ask in workload.asks]
        return [future.result() for future in waiting]


def _timed(driver: Driver, ask: Ask, picture: bytes, start: float) -> Trace:
    time.sleep(max(0.0, start + ask.at - time.perf_counter()))
    return _one(driver, ask, picture)


def _one(driver: Driver, ask: Ask, picture: bytes) -> Trace:
    sent = time.perf_counter()
    stream = driver.ask(picture, ask.question, ask.max_tokens)
    pieces: list[float] = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return Trace(sent, tuple(pieces), time.perf_counter(), end.value)
        except RequestFailed as error:
            return Trace(sent, tuple(pieces), time.perf_counter(), Usage(), str(error))
