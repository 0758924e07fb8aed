"""Which settings are fastest on this machine: candidates, measured in turn with the baseline, because machines drift.

Each measurement loads the pair, asks, and closes it, so no two engines share the machine.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import TYPE_CHECKING, Any, Literal

from opsin.bench.report import columns, rounded
from opsin.bench.workloads import image_file
from opsin.core.answer import TokenLogprob
from opsin.core.errors import OpsinError
from opsin.core.request import Prompt, SamplingParams
from opsin.core.settings import EngineSettings, ImageSettings
from opsin.images import load_image
from opsin.prompt import Message

if TYPE_CHECKING:
    from opsin.compose import Runtime

Changes = Mapping[str, Any]
"""Settings that differ from the baseline's."""
Target = Literal["interactive", "throughput"]
"""What is to be fast: one question asked alone, or several at once."""

MIN_GAIN = 0.02  # what must be won beyond the noise: less is not worth a line in a file
REPEATS = 3  # measurements of a candidate that may win; all others are measured once
FINALISTS = 2
MIN_NOISE = 0.003
MAX_DRIFT = 0.05  # how much the log probability (natural) of an answered token may change: 5 % of its probability
AT_ONCE = 8
_FIGURES = ("ratios", "ratio", "drift", "verdict")
ANSWER = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, guard=False)
_CHECKED = ANSWER.model_copy(update={"max_tokens": 12, "logprobs": 10})


def question(runtime: "Runtime", number: int | None, text: str = "what is this?") -> Prompt:
    """A question about the image of that number (None: about none); equal numbers give equal images."""
    images = [] if number is None else [load_image(image_file(number), ImageSettings())]
    return runtime.prompts.build([Message("user", [*images, text])])


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement: seconds per answer, and greedy answers with the likeliest tokens, to compare."""

    seconds: float
    answers: tuple[tuple[TokenLogprob, ...], ...]


def measure(runtime: "Runtime", at_once: int) -> Timing:
    """Ask `at_once` questions about different new images together, twice; the faster of both counts.

    The first time also warms up. Raises BadInput, EngineError.
    """
    runs = []
    for run in range(2):
        prompts = [question(runtime, AT_ONCE * run + number) for number in range(at_once)]  # before the clock runs
        began = time.perf_counter()
        for stream in [runtime.engine.submit(prompt, ANSWER) for prompt in prompts]:
            stream.result()
        runs.append(time.perf_counter() - began)
    # The images are encoded already, so this costs little.
    again = [question(runtime, AT_ONCE * run, "how many things are there?") for run in range(2)]
    answers = [runtime.engine.submit(prompt, _CHECKED).result().logprobs for prompt in again]
    return Timing(min(runs) / at_once, tuple(answers))


def drift(before: Sequence[TokenLogprob], after: Sequence[TokenLogprob]) -> float:
    """The most that the log probability of an answered token changed, in nats, up to where the answers part.

    There it counts how much less likely the other token was before; infinite if it was not even likely.
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
    """Settings to try; by measurement the ratio to the baseline's time, the most that answers changed, a verdict."""

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
        return geometric_mean(counted) if counted else math.inf

    @property
    def may_win(self) -> bool:
        """Whether it is fast enough to be measured again, and answers as the baseline does."""
        return self.drift <= MAX_DRIFT and self.ratio < 1.0 - MIN_GAIN


def candidates(
    settings: EngineSettings, fixed: Iterable[str], cores: int, projectors: Iterable[Path] = ()
) -> list[Candidate]:
    """What is worth trying, in turn; `fixed` are settings that the user chose, which stay. `cores`: logical ones."""
    half = max(1, cores // 2)
    threads = ((half, half), (half, cores), (cores, cores)) if cores > 1 else ()
    found: list[dict[str, Any]] = [
        *({"threads": decode, "threads_batch": batch} for decode, batch in threads),
        *({"mmproj": path} for path in projectors),
        {"flash_attention": False},
        {"vision_flash_attention": False},
        *({"ubatch": rows} for rows in (512, 2048) if rows != settings.ubatch),
    ]
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
        tried = [
            {"settings": _plain(row.changes), **{name: getattr(row, name) for name in _FIGURES}}
            for row in self.candidates
        ]
        return rounded(
            {
                "kind": "tune",
                "profile": self.target,
                "at_once": self.at_once,
                "baseline_seconds": self.baseline,
                "noise": self.noise,
                "candidates": tried,
                "recommended": self.best and _plain(self.best.changes),
                "ratio": self.best and self.best.ratio,
                "seconds": self.seconds,
            }
        )

    def as_text(self) -> str:
        """One table and one recommendation."""
        count = len(self.baseline) + sum(len(row.ratios) for row in self.candidates)
        noise = f"{self.noise:.1%}" if math.isfinite(self.noise) else "unknown"
        rows = [
            [shown(row.changes), *([f"{row.ratio:.3f}", f"{row.drift:.3f}"] if row.ratios else ["", ""]), row.verdict]
            for row in self.candidates
        ]
        measured, count_all = sum(bool(row.ratios) for row in self.candidates), len(self.candidates)
        picked = "keep the settings as they are: nothing is faster beyond the noise"
        if measured < count_all:
            told = f"{measured} of {count_all} were measured" if measured else "nothing was measured"
            picked += f" ({told}; --minutes gives more time)"
        if self.best is not None:
            picked = f"{shown(self.best.changes)} takes {self.best.ratio:.3f} of the time"
        return (
            f"{count} measurements in {self.seconds:.0f} s; noise {noise}\n"
            f"baseline: {median(self.baseline):.3f} s per answer, {self.at_once} at once\n\n"
            f"{columns(('settings', 'x baseline', 'answers moved by', ''), rows)}\n\n"
            f"recommended for {self.target}: {picked}"
        )


@dataclass
class Tuner:
    """Measures candidates in turn with `settings` for about so many minutes; none wins that changes answers."""

    open_runtime: Callable[[EngineSettings], "Runtime"]
    settings: EngineSettings
    target: Target
    minutes: float = 10.0
    tell: Callable[[str], None] = lambda _: None
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.at_once = min(AT_ONCE, self.settings.parallel) if self.target == "throughput" else 1
        self._began = self.now()
        self._longest = 0.0
        self._baseline: list[Timing] = []

    def run(self, candidates: Sequence[Candidate]) -> Report:
        """Measure, and recommend. Raises what loading and asking with the baseline's settings raises."""
        rows = [*candidates]
        self._baseline = [self._measure({})]
        self._compare(rows)
        hopeful = sorted((row for row in rows if row.may_win), key=lambda row: row.ratio)[:FINALISTS]
        self._compare(hopeful * (REPEATS - 1))
        winners = [row for row in hopeful if self._wins(row)]
        if len(winners) == FINALISTS and not winners[0].changes.keys() & winners[1].changes.keys():
            both = Candidate({**winners[0].changes, **winners[1].changes})
            rows.append(both)
            self._compare([both] * REPEATS)
            winners += [both] if self._wins(both) else []
        for row in rows:
            if row.ratios:
                others = "changes answers" if row.drift > MAX_DRIFT else "not faster"
                row.verdict = "faster" if row in winners else others
        best = min(winners, key=lambda row: row.ratio, default=None)
        baseline = tuple(timing.seconds for timing in self._baseline)
        return Report(self.target, self.at_once, baseline, self.noise, tuple(rows), best, self.now() - self._began)

    @property
    def noise(self) -> float:
        """How far a baseline is from the mean of the two beside it, as a share; infinite while unknown."""
        logs = [math.log(timing.seconds) for timing in self._baseline]
        apart = [middle - (a + b) / 2 for a, middle, b in zip(logs, logs[1:], logs[2:], strict=False)]
        return max(MIN_NOISE, math.sqrt(fmean(one * one for one in apart))) if apart else math.inf

    def _measure(self, changes: Changes) -> Timing:
        self.tell(f"measuring: {shown(changes)}")
        began = self.now()
        # Through the constructor, so that values are checked.
        settings = EngineSettings(**{**self.settings.model_dump(exclude_unset=True), **changes})
        with closing(self.open_runtime(settings)) as runtime:
            timing = measure(runtime, self.at_once)
        self._longest = max(self._longest, self.now() - began)
        return timing

    def _compare(self, rows: Sequence[Candidate]) -> None:
        """Measure each candidate and then the baseline again, where there is time for both."""
        for row in rows:
            if self.now() + 2 * self._longest > self._began + 60 * self.minutes:
                return
            try:
                timing = self._measure(row.changes)
            except OpsinError as error:  # settings that this machine or model cannot have are a finding
                row.verdict = f"not possible: {error}"
                continue
            before = self._baseline[-1]
            with suppress(OpsinError):  # it worked before: something else took the memory for a moment
                self._baseline.append(self._measure({}))
            after = self._baseline[-1]
            row.ratios.append(timing.seconds / geometric_mean([before.seconds, after.seconds]))
            row.drift = max(row.drift, *map(drift, self._baseline[0].answers, timing.answers))

    def _wins(self, row: Candidate) -> bool:
        margin = 2.5 * self.noise / math.sqrt(REPEATS - 1)  # standard errors of the mean
        return len(row.ratios) >= REPEATS and row.may_win and math.log(row.ratio) + margin < math.log(1.0 - MIN_GAIN)


def shown(changes: Changes) -> str:
    """Settings in one line."""
    return ", ".join(f"{name} {value}" for name, value in _plain(changes).items()) or "baseline"


def _plain(changes: Changes) -> dict[str, Any]:
    return {name: value.name if isinstance(value, Path) else value for name, value in changes.items()}
