"""Which settings are fastest on this machine: candidates, measured in turn with the baseline.

Baseline, candidate, baseline, candidate, and so on, because machines drift: a candidate is compared with the baselines
right before and after it. Each measurement loads the pair, asks, and closes it, so no two engines share the memory or
the cores, and settings are measured as they are used.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, Protocol

import numpy as np

from opsin.core.answer import TokenLogprob
from opsin.core.errors import OpsinError
from opsin.core.parts import Prompt
from opsin.core.picture import Picture
from opsin.core.sampling import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.engine import Engine
from opsin.prompt import Message, PromptBuilder

Changes = Mapping[str, Any]
"""Settings that differ from the baseline's."""
Target = Literal["interactive", "throughput"]
"""What is to be fast: one question asked alone, or several at once."""

MIN_GAIN = 0.02
"""What must be won beyond the noise: less is not worth a line in a file."""
REPEATS = 3
"""Measurements of a candidate that may win. All others are measured once."""
FINALISTS = 2
MIN_NOISE = 0.003
MAX_DRIFT = 0.05
"""How much the log probability (natural) of an answered token may change: 5 % of its probability."""
AT_ONCE = 8
ANSWER = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, guard=False)
"""Greedy, and of equal length whatever the settings."""
_CHECKED = ANSWER.model_copy(update={"max_tokens": 12, "logprobs": 10})


class Runtime(Protocol):
    """An engine with its model loaded, and what writes prompts for it: `opsin.compose.Runtime`."""

    @property
    def engine(self) -> Engine:
        """Answers questions."""
        ...

    @property
    def prompts(self) -> PromptBuilder:
        """Writes prompts for the model."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


OpenRuntime = Callable[[EngineSettings], Runtime]


def image(number: int) -> Picture:
    """An image of 640×480 pixels with about the detail of a photograph; equal numbers give equal images."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 240, (15, 20, 3), dtype=np.uint8).repeat(32, axis=0).repeat(32, axis=1)
    rgb = (coarse + rng.integers(0, 16, coarse.shape, dtype=np.uint8)).tobytes()
    return Picture(rgb, 640, 480, hashlib.sha256(rgb).hexdigest(), "PNG", 640, 480)


def question(runtime: Runtime, number: int | None, text: str = "what is this?") -> Prompt:
    """A question about the image of that number (None: about none)."""
    content: list[str | Picture] = [text] if number is None else [image(number), text]
    return runtime.prompts.build([Message("user", content)])


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement: seconds per answer, and greedy answers with the likeliest tokens, to compare."""

    seconds: float
    answers: tuple[tuple[TokenLogprob, ...], ...]


def measure(runtime: Runtime, at_once: int) -> Timing:
    """Ask `at_once` questions about different new images together, twice; the faster of both counts.

    The first time also warms up, and a machine that is busy for a moment spoils one of them, not both. Raises
    BadInput, EngineError.
    """
    runs = []
    for run in range(2):
        # Images are made before the clock runs.
        prompts = [question(runtime, AT_ONCE * run + number) for number in range(at_once)]
        began = time.perf_counter()
        for stream in [runtime.engine.submit(prompt, ANSWER) for prompt in prompts]:
            stream.result()
        runs.append(time.perf_counter() - began)
    # The images are encoded already, so this costs little.
    again = [question(runtime, AT_ONCE * run, "how many things are there?") for run in range(2)]
    answers = [runtime.engine.submit(prompt, _CHECKED).result().logprobs for prompt in again]
    return Timing(min(runs) / at_once, tuple(answers))


def drift(before: Sequence[TokenLogprob], after: Sequence[TokenLogprob]) -> float:
    """The most that the log probability of an answered token changed, in nats, as far as both answers are alike.

    Where they part, it counts how much less likely the other token was before; a token that was not even among the
    likely ones counts as infinitely far.
    """
    worst = 0.0
    for old, new in zip(before, after, strict=False):
        if old.token != new.token:
            known = {token: logprob for token, _, logprob in old.top}
            return max(worst, old.logprob - known.get(new.token, -math.inf))
        worst = max(worst, abs(old.logprob - new.logprob))
    return worst


@dataclass(slots=True)
class Candidate:
    """Settings to try, and the result: the ratio to the baseline's time, one for each measurement.

    `drift` is the most that answers changed; `verdict` is one of a few words, or why it could not be measured.
    """

    changes: Changes
    ratios: list[float] = field(default_factory=list)
    drift: float = 0.0
    verdict: str = "no time left"

    @property
    def ratio(self) -> float:
        """The geometric mean of the ratios; infinite where nothing was measured.

        The first one decides which candidates are measured again, so luck flatters it: then only the others count.
        """
        counted = self.ratios[1:] or self.ratios
        return math.exp(fmean(map(math.log, counted))) if counted else math.inf


def candidates(
    settings: EngineSettings, fixed: Iterable[str], cores: int, projectors: Iterable[Path] = ()
) -> list[Candidate]:
    """What is worth trying: threads, projector type, flash attention and ubatch, one after another.

    `fixed` are settings that the user chose, which stay. `cores` are logical ones; `projectors` are files that may
    stand in for the projector.
    """
    half = max(1, cores // 2)
    found: list[dict[str, Any]] = []
    if cores > 1:
        found += [{"threads": a, "threads_batch": b} for a, b in ((half, half), (half, cores), (cores, cores))]
    found += [{"mmproj": path} for path in projectors]
    found += [{"flash_attention": False}, {"vision_flash_attention": False}]
    found += [{"ubatch": rows} for rows in (512, 2048) if rows != settings.ubatch]
    return [Candidate(changes) for changes in found if not changes.keys() & set(fixed)]


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured: `baseline` in seconds per answer, `noise` as a share. `best` is None where nothing won."""

    target: Target
    at_once: int
    baseline: tuple[float, ...]
    noise: float
    candidates: tuple[Candidate, ...]
    best: Candidate | None
    seconds: float

    def as_document(self) -> dict[str, Any]:
        """Plain JSON values; times in seconds."""
        rows = [
            {
                "settings": _plain(row.changes),
                "ratios": [round(value, 4) for value in row.ratios],
                "ratio": round(row.ratio, 4) if row.ratios else None,
                "drift": round(row.drift, 4) if math.isfinite(row.drift) else None,
                "verdict": row.verdict,
            }
            for row in self.candidates
        ]
        return {
            "kind": "tune",
            "profile": self.target,
            "at_once": self.at_once,
            "baseline_seconds": [round(value, 5) for value in self.baseline],
            "noise": round(self.noise, 4) if math.isfinite(self.noise) else None,
            "candidates": rows,
            "recommended": None if self.best is None else _plain(self.best.changes),
            "ratio": None if self.best is None else round(self.best.ratio, 4),
            "seconds": round(self.seconds, 1),
        }

    def as_text(self) -> str:
        """One table and one recommendation."""
        width = max(len(shown(row.changes)) for row in (*self.candidates, Candidate({})))
        count = len(self.baseline) + sum(len(row.ratios) for row in self.candidates)
        noise = f"{self.noise:.1%}" if math.isfinite(self.noise) else "unknown"
        lines = [
            f"{count} measurements in {self.seconds:.0f} s; noise {noise}",
            f"baseline: {median(self.baseline):.3f} s per answer, {self.at_once} at once",
            "",
            f"  {'settings':<{width}}  x baseline  answers moved by",
        ]
        for row in self.candidates:
            figures = f"{row.ratio:10.3f}  {row.drift:16.3f}" if row.ratios else " " * 28
            lines.append(f"  {shown(row.changes):<{width}}  {figures}  {row.verdict}")
        picked = "keep the settings as they are: nothing is faster beyond the noise"
        if self.best is not None:
            picked = f"{shown(self.best.changes)} takes {self.best.ratio:.3f} of the time"
        return "\n".join([*lines, "", f"recommended for {self.target}: {picked}"])


@dataclass
class Tuner:
    """Measures candidates in turn with `settings`, for at most about so many minutes.

    A candidate that cannot be loaded, or fails, is a row of the table, and none may win that changes answers by more
    than `MAX_DRIFT`.
    """

    open_runtime: OpenRuntime
    settings: EngineSettings
    target: Target
    minutes: float = 10.0
    tell: Callable[[str], None] = lambda _: None
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.at_once = min(AT_ONCE, self.settings.parallel) if self.target == "throughput" else 1
        self._began = self.now()
        self._longest = 0.0
        self._baseline: list[float] = []
        self._answers: tuple[tuple[TokenLogprob, ...], ...] = ()

    def run(self, candidates: Sequence[Candidate]) -> Report:
        """Measure, and recommend. Raises what loading and asking with the baseline's settings raises."""
        first = self._measure({})
        self._baseline, self._answers = [first.seconds], first.answers
        for candidate in candidates:
            self._compare(candidate)
        rows = [*candidates]
        hopeful = sorted(filter(self._may_win, rows), key=lambda row: row.ratio)[:FINALISTS]
        for _ in range(REPEATS - 1):
            for candidate in hopeful:
                self._compare(candidate)
        winners = [row for row in hopeful if self._wins(row)]
        if len(winners) == FINALISTS and not winners[0].changes.keys() & winners[1].changes.keys():
            both = Candidate({**winners[0].changes, **winners[1].changes})
            rows.append(both)
            for _ in range(REPEATS):
                self._compare(both)
            winners += [both] if self._wins(both) else []
        for row in rows:
            if row.ratios:
                others = "changes answers" if row.drift > MAX_DRIFT else "not faster"
                row.verdict = "faster" if row in winners else others
        best = min(winners, key=lambda row: row.ratio, default=None)
        took = self.now() - self._began
        return Report(self.target, self.at_once, tuple(self._baseline), self.noise, tuple(rows), best, took)

    @property
    def noise(self) -> float:
        """How far a baseline measurement is from the mean of the two beside it, as a share; infinite while unknown.

        A candidate that changes nothing has a ratio that is as far from 1.
        """
        logs = [math.log(seconds) for seconds in self._baseline]
        apart = [middle - (a + b) / 2 for a, middle, b in zip(logs, logs[1:], logs[2:], strict=False)]
        return max(MIN_NOISE, math.sqrt(fmean(one * one for one in apart))) if apart else math.inf

    def _measure(self, changes: Changes) -> Timing:
        self.tell(shown(changes))
        began = self.now()
        # Through the constructor, so that values are checked.
        settings = EngineSettings(**{**self.settings.model_dump(exclude_unset=True), **changes})
        with closing(self.open_runtime(settings)) as runtime:
            timing = measure(runtime, self.at_once)
        self._longest = max(self._longest, self.now() - began)
        return timing

    def _compare(self, candidate: Candidate) -> None:
        """Measure a candidate and then the baseline again, where there is time for both."""
        if self.now() + 2 * self._longest > self._began + 60 * self.minutes:
            return
        try:
            timing = self._measure(candidate.changes)
        except OpsinError as error:
            # Settings that this machine or model cannot have are a finding, not the end.
            candidate.verdict = f"not possible: {error}"
            return
        try:
            self._baseline.append(self._measure({}).seconds)
            before, after = self._baseline[-2:]
        except OpsinError:
            # It worked before: something else took the memory for a moment. The baseline before it is enough.
            before = after = self._baseline[-1]
        candidate.ratios.append(timing.seconds / math.sqrt(before * after))
        candidate.drift = max(candidate.drift, *map(drift, self._answers, timing.answers))

    def _may_win(self, candidate: Candidate) -> bool:
        return candidate.drift <= MAX_DRIFT and candidate.ratio < 1.0 - MIN_GAIN

    def _wins(self, candidate: Candidate) -> bool:
        margin = 2.5 * self.noise / math.sqrt(REPEATS - 1)  # standard errors of the mean
        enough = len(candidate.ratios) >= REPEATS and self._may_win(candidate)
        return enough and math.log(candidate.ratio) + margin < math.log(1.0 - MIN_GAIN)


def shown(changes: Changes) -> str:
    """Settings in one line."""
    return ", ".join(f"{name} {value}" for name, value in _plain(changes).items()) or "baseline"


def _plain(changes: Changes) -> dict[str, Any]:
    return {name: value.name if isinstance(value, Path) else value for name, value in changes.items()}
