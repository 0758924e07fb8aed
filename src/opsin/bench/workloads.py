"""The five workloads and their images; runs them on drivers: times of each answer, and medians over runs."""

import io
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from statistics import median
from typing import Self

from opsin.core.answer import Usage
from opsin.core.errors import BadParameter, OpsinError

TOKENS = 32
IMAGE_SIZE = (640, 480)
_WARM_UP_RUN = 10_000  # its images are those of no measured run


class RequestFailed(OpsinError):
    """A server refused a question or broke off its answer."""


Driver = Callable[[bytes, str, int], Generator[float, None, Usage]]
"""Answers a question about an image (its bytes) greedily, with an engine in this process or a server, by any thread.

Yields `time.perf_counter()` at each piece of the answer, which has as many tokens as are given; returns the counts.
"""


@dataclass(frozen=True, slots=True)
class Ask:
    """A question about one of the workload's images (`image` is an index), sent `at` seconds after the start."""

    image: int
    question: str = "what is this?"
    max_tokens: int = TOKENS
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Questions, sent one after another or (`at_once`) each at its time; of `stream` the answer is watched."""

    name: str
    title: str
    asks: tuple[Ask, ...]
    at_once: bool = False
    stream: int | None = None


_QUESTIONS = (
    *("what is this?", "what colours are there?", "is it day or night?", "how many things are there?"),
    *("what is in front?", "where was it taken?", "what is on the left?", "is anybody there?"),
)
_STREAM = (Ask(0, max_tokens=96), *(Ask(i, max_tokens=8, at=at) for i, at in enumerate((0.5, 0.8, 1.1), start=1)))


def choose(names: Iterable[str] | None = None, tokens: int = TOKENS, questions: int = 8) -> tuple[Workload, ...]:
    """The workloads with these names, in their own order; None means all five. Raises BadParameter.

    `tokens` is the length of the answers of W1 to W4, `questions` how many W3 has.
    """
    images = tuple(Ask(i, max_tokens=tokens) for i in range(8))
    asked = (*_QUESTIONS, *(f"{_QUESTIONS[n % 8]} ({n})" for n in range(8, questions)))
    same = tuple(Ask(0, question, tokens) for question in asked)
    found: tuple[Workload, ...] = (
        Workload("W1", "4 new images, one after another", images[:4]),
        Workload("W2", "6 questions about one image, one after another", same[:6]),
        Workload("W3", f"{questions} questions about one new image, at once", same[:questions], at_once=True),
        Workload("W4", "8 new images, at once", images, at_once=True),
        Workload("W5", "a stream of 96 tokens while 3 new images arrive", _STREAM, at_once=True, stream=0),
    )
    wanted = {one.name for one in found} if names is None else {name.strip().upper() for name in names}
    found = tuple(one for one in found if one.name in wanted)
    if len(found) < len(wanted):
        raise BadParameter(f"There are no workloads {', '.join(sorted(wanted))}: choose some of W1 to W5.")
    return found


def image_file(seed: int) -> bytes:
    """The bytes of a 640×480 PNG with about the detail of a photograph; equal seeds give equal images."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(IMAGE_SIZE, Image.Resampling.BICUBIC))
    grain = rng.integers(0, 8, smooth.shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray((smooth & np.uint8(0xF8)) | grain).save(file, "PNG", compress_level=1)
    return file.getvalue()


def images_of(workload: Workload, run: int) -> list[bytes]:
    """The images of one run; no other run and no other workload has any of them."""
    first = (sum(workload.name.encode()) * 1000 + run) * 100
    return [image_file(first + i) for i in range(len({ask.image for ask in workload.asks}))]


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer: when it was asked for, each piece came, and it ended, in seconds; `failed` is the server's error."""

    sent: float
    pieces: tuple[float, ...]
    ended: float
    usage: Usage
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """One run, or the medians of several: medians over the answers, or the figures of the workload's `stream`.

    `first_token_max_ms` is the slowest question's, `token_ms` the time per token after the first one.
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

    def with_run(self, timings: Sequence[Timing]) -> Self:
        """The result with one more run, which makes it invalid if that is."""
        invalid, usages = invalid_reason(self.workload, timings), tuple(timing.usage for timing in timings)
        failed = self.failed + sum(timing.failed is not None for timing in timings)
        runs = self.runs if invalid else (*self.runs, stats_of(self.workload, timings))
        return replace(self, runs=runs, usages=usages, invalid=invalid, failed=failed)


def run_workload(driver: Driver, workload: Workload, images: Sequence[bytes]) -> list[Timing]:
    """Ask all questions, a thread each if `at_once`; timings in the same order. Raises what the driver raises."""
    start = time.perf_counter()

    def run(ask: Ask) -> Timing:
        if workload.at_once:
            time.sleep(max(0.0, start + ask.at - time.perf_counter()))
        sent = time.perf_counter()
        stream = driver(images[ask.image], ask.question, ask.max_tokens)
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
    drivers: Mapping[str, Driver], workload: Workload, *, runs: int = 3, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Result]:
    """Run a workload on each driver in turn, every second run backwards; one whose result is invalid is left out."""
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
    for _ in driver(images_of(workload, _WARM_UP_RUN)[0], workload.asks[0].question, 4):
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
