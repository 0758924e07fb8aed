"""Coordinate search over few candidates, on measurements that are noisy.

Candidate and incumbent are measured in turn, since machines drift: only ratios of neighbours count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, Protocol

from opsin.core.errors import OpsinError

Choice = Mapping[str, Any]
"""Settings that differ from the untuned ones."""
Part = Literal["encode", "language"]
Objective = Literal["latency", "throughput", "both"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "both")

LEAST_GAIN = 0.01
"""What must be won beyond the noise: less is not worth a line in a file."""
ROUNDS = 6
LEAST_ROUNDS = 3
"""Fewer tell too little of the noise for anything to win."""
_LEAST_NOISE = 0.003
_STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # quantiles (97.5 %) of Student's t, by rounds; 2.45 of more


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one question asked alone, and seconds each answer takes of a machine that answers many at once."""

    latency: float
    batch: float

    def by(self, objective: Objective) -> float:
        """What is to be small."""
        if objective == "both":
            return math.sqrt(self.latency * self.batch)
        return self.latency if objective == "latency" else self.batch


@dataclass(frozen=True, slots=True)
class Dimension:
    """Settings that are tried together, one candidate at a time, and the part of the work that they change.

    Those that are `checked` may change answers by more than the order of a sum does, so what wins must be admitted.
    """

    name: str
    part: Part
    candidates: tuple[Choice, ...]
    checked: bool = False


class Trial(Protocol):
    """Settings made ready to be measured."""

    def run(self) -> Cost:
        """Measure once, shortly. Raises OpsinError."""
        ...

    def close(self) -> None:
        """Free what was opened."""
        ...


@dataclass(frozen=True, slots=True)
class Ratio:
    """A cost over the incumbent's: the geometric mean of the rounds' ratios, and half of its 95 % interval."""

    value: float
    noise: float
    rounds: int = LEAST_ROUNDS

    @property
    def wins(self) -> bool:
        """Whether it is better by more than the noise."""
        return self.rounds >= LEAST_ROUNDS and self.value + self.noise < 1.0 - LEAST_GAIN

    @property
    def hopeless(self) -> bool:
        """Whether more rounds can hardly make it win."""
        return self.value - self.noise > 1.0 - LEAST_GAIN


@dataclass(frozen=True, slots=True)
class Tried:
    """What a candidate gave. `ratios` is empty where it could not be measured; `verdict` is one of a few words."""

    dimension: str
    choice: Choice
    verdict: str
    ratios: Mapping[Objective, Ratio] = field(default_factory=dict)
    rounds: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """The best choice for each objective (empty: the untuned settings), and all that was tried on the way."""

    best: Mapping[Objective, Choice]
    tried: tuple[Tried, ...]
    out_of_time: bool


def ratio_of(ours: Sequence[float], base: Sequence[float], noise: float) -> Ratio:
    """Ratio of rounds measured in pairs; `noise` is a single round's, as it is known of the machine.

    Rounds that happen to agree do not make it smaller than that allows.
    """
    logs = [math.log(a / b) for a, b in zip(ours, base, strict=True)]
    rounds = len(logs)
    seen = _STUDENT.get(rounds, 2.45) * stdev(logs) if rounds > 1 else 0.0
    return Ratio(math.exp(fmean(logs)), max(max(seen, noise) / math.sqrt(rounds), _LEAST_NOISE), rounds)


def compare(
    base: Trial, other: Trial, *, noise: float, may_go_on: Callable[[], bool] = lambda: True, rounds: int = ROUNDS
) -> tuple[dict[Objective, Ratio], int]:
    """Measure two in turn (every second round the other way round) until it is clear who wins; ratios and rounds.

    `noise` is how far two measurements of one thing may differ on this machine, as a share. A candidate is given up
    after its first measurement when it is worse by more than that for every objective. Raises OpsinError.
    """
    costs: list[tuple[Cost, Cost]] = []
    ratios: dict[Objective, Ratio] = {}
    for turn in range(rounds):
        if turn % 2 == 0:
            first = base.run()
            costs.append((first, other.run()))
        else:
            second = other.run()
            costs.append((base.run(), second))
        ratios = {o: ratio_of([c.by(o) for _, c in costs], [b.by(o) for b, _ in costs], noise) for o in OBJECTIVES}
        if all(ratio.hopeless for ratio in ratios.values()):
            break
        # What is no better on average after three rounds needs no fourth.
        if turn + 1 >= LEAST_ROUNDS and all(ratio.wins or ratio.value > 1.0 - LEAST_GAIN for ratio in ratios.values()):
            break
        if not may_go_on():
            break
    return ratios, len(costs)


@dataclass
class Search:
    """Goes through the dimensions one after another; each candidate is measured against the best so far.

    `open_trial` makes settings ready; `admit` says why a choice may not be made, None when it may. No measurement is
    begun after `deadline`, a time of `now`, nor when it can be foreseen to end behind it: `expected` are the seconds of
    a candidate before one was measured. While nothing has won the search goes on until `last`. `untuned` are values
    that the untuned settings are known to have, which need not be tried.
    """

    open_trial: Callable[[Choice, Part], Trial]
    noise: float
    deadline: float
    now: Callable[[], float]
    last: float = -math.inf
    expected: float = 0.0
    untuned: Choice = field(default_factory=dict)
    admit: Callable[[Choice], str | None] = lambda _: None
    tell: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        self._best: dict[Objective, Choice] = {objective: {} for objective in OBJECTIVES}
        self._tried: list[Tried] = []
        self._took: dict[Part, float] = {}
        self._late = False

    def run(self, dimensions: Iterable[Dimension]) -> Found:
        """Try all candidates as time allows."""
        for dimension in dimensions:
            self._dimension(dimension)
        return Found(dict(self._best), tuple(self._tried), self._late)

    @property
    def _end(self) -> float:
        return self.deadline if any(self._best.values()) else max(self.deadline, self.last)

    def _dimension(self, dimension: Dimension) -> None:
        incumbent = self._best["both"]
        winners: dict[Objective, tuple[float, Choice]] = {}
        base: Trial | None = None
        try:
            for candidate in dimension.candidates:
                if candidate.items() <= {**self.untuned, **incumbent}.items():
                    continue
                if self.now() + self._took.get(dimension.part, self.expected) > self._end:
                    self._late = True
                    self._tried.append(Tried(dimension.name, candidate, "no time left"))
                    continue
                self.tell(f"{dimension.name}: {shown(candidate)}")
                began = self.now()
                base = base or self.open_trial(incumbent, dimension.part)
                tried = self._candidate(dimension, candidate, base, incumbent)
                self._took[dimension.part] = max(self._took.get(dimension.part, 0.0), self.now() - began)
                self._tried.append(tried)
                if tried.verdict != "better":
                    continue
                for objective, ratio in tried.ratios.items():
                    before = winners.get(objective, (1.0, {}))[0]
                    if ratio.wins and ratio.value < before:
                        winners[objective] = ratio.value, candidate
        finally:
            if base is not None:
                base.close()
        for objective, (_, candidate) in winners.items():
            self._best[objective] = {**self._best[objective], **candidate}

    def _candidate(self, dimension: Dimension, candidate: Choice, base: Trial, incumbent: Choice) -> Tried:
        choice = {**incumbent, **candidate}
        try:
            other = self.open_trial(choice, dimension.part)
            try:
                ratios, rounds = compare(base, other, noise=self.noise, may_go_on=lambda: self.now() < self._end)
            finally:
                other.close()
            verdict = "better" if any(ratio.wins for ratio in ratios.values()) else "no better"
            open_still = any(ratio.value < 1.0 - LEAST_GAIN and not ratio.hopeless for ratio in ratios.values())
            if verdict != "better" and open_still and rounds < ROUNDS and self.now() >= self._end:
                self._late, verdict = True, "no time left"
            if verdict == "better" and dimension.checked:
                why = self.admit(choice)
                verdict = verdict if why is None else f"refused: {why}"
        except OpsinError as error:
            # Settings that this machine or model cannot have are a finding, not the end.
            return Tried(dimension.name, candidate, f"not possible: {error}")
        return Tried(dimension.name, candidate, verdict, ratios, rounds)


def plain(value: Any) -> Any:
    """Values that JSON knows, with numbers of five digits; of a path its file's name."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value.name if isinstance(value, Path) else round(value, 5) if isinstance(value, float) else value


def shown(choice: Choice) -> str:
    """A choice in one line."""
    return ", ".join(f"{name} {value}" for name, value in plain(choice).items()) or "untuned"
