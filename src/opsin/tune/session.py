"""One tuning from beginning to end: survey, search, finals, choice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from opsin.core.errors import OpsinError
from opsin.core.settings import EngineSettings
from opsin.tune.finals import ROUNDS, Final, play_final, workloads
from opsin.tune.pareto import Point, Profile, pareto, pick
from opsin.tune.projector import ProjectorType
from opsin.tune.rig import OpenRig, Pieces, Rig, RigTrial, sized, survey
from opsin.tune.search import LEAST_GAIN, LEAST_ROUNDS, Choice, Found, Part, Search, Tried, plain, shown
from opsin.tune.space import SHARING, Wish, dimensions
from opsin.tune.tolerance import judge, reference

SEARCH_SHARE = 0.5
"""Of the time goes to the search; the finals take what they need of the rest."""
CONFIRM = 3
"""Rounds of what was picked against the untuned settings; the figures that are told are of these alone."""
_THREADS = ("threads", "threads_batch", "threads_encode")
_ENCODER = frozenset({"mmproj", "mmproj_device", "vision_flash_attention"})


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. `picked` is the untuned point where nothing won; `settings` are what belongs in the file.

    `checks` tell how near what was picked comes to the untuned answers.
    """

    profile: Profile
    pieces: Pieces
    noise: float
    tried: tuple[Tried, ...]
    points: tuple[Point, ...]
    picked: Point
    seconds: float
    settings: Choice = field(default_factory=dict)
    checks: str = ""
    notes: tuple[str, ...] = ()

    @property
    def front(self) -> tuple[Point, ...]:
        """The finalists that nobody beats."""
        return pareto(self.points)

    def as_document(self) -> dict[str, Any]:
        """Everything in plain JSON values; times in seconds, ratios over untuned times."""
        names = {"picked": self.picked.name, "pareto": [point.name for point in self.front]}
        return {"kind": "tune", **plain(asdict(self)), **names}


@dataclass
class Tuning:
    """Opens engines with the settings to be tried. `settings` are the untuned ones, with model and projector."""

    open_rig: OpenRig
    settings: EngineSettings
    wish: Wish
    convert: Callable[[Path, ProjectorType], Path | None]
    check_room: Callable[[EngineSettings], None] = lambda _: None
    now: Callable[[], float] = time.monotonic
    tell: Callable[[str, float], None] = lambda _text, _share: None

    def __post_init__(self) -> None:
        self._began = self.now()
        self._end = self._began + 60 * self.wish.minutes
        self._deadline = self._began + SEARCH_SHARE * 60 * self.wish.minutes
        self._checks: dict[str, tuple[str | None, str]] = {}

    def run(self) -> Report:
        """Measure, and choose. Raises what opening the untuned settings raises, and what `check_room` does."""
        wish = self.wish
        self._say("loading")
        facts = sized(self.open_rig, self.settings, gpus=bool(wish.gpus))
        # The untuned numbers of threads, said aloud: one of them left out would follow another that is tried.
        threads = dict(zip(_THREADS, facts.threads, strict=True))
        self._base = facts.settings.model_copy(update=threads)
        self._sequences = min(8, self._base.parallel)
        self.check_room(self._base)
        loading = self.now()
        with ExitStack() as stack:
            rig = self._opened(stack, {})
            self._say("measuring the untuned settings")
            self._load = self.now() - loading
            self._pieces, self._noise = survey(rig, self._sequences)
            asking = self.now()
            self._before = reference(rig)
            self._check_seconds = self._load + self.now() - asking
        # The finals take what is left, and that is no less than they need.
        after = self._takes(CONFIRM) + self._check_seconds
        self._deadline = max(self._deadline, self._end - self._takes(ROUNDS) - after)
        space = dimensions(wish, facts, self._convert)
        search = Search(
            self._trial,
            noise=self._noise,
            deadline=self._deadline,
            last=self._end - self._takes(LEAST_ROUNDS) - after,
            now=self.now,
            # Two are opened and warmed up, and measured once.
            expected=2 * self._load + 4 * self._pieces.cost.latency,
            untuned=threads,
            admit=self._admit,
            tell=self._say,
        )
        found = search.run(space)
        points, left_out = self._finals(found)
        points, picked, refused = self._admitted(points)
        return Report(
            profile=wish.profile,
            pieces=self._pieces,
            noise=self._noise,
            tried=found.tried,
            points=points,
            picked=picked,
            seconds=self.now() - self._began,
            settings=self._worth_saying(picked.choice),
            checks=self._checks.get(repr(picked.choice), (None, ""))[1],
            notes=(*(["the time was over before all was tried"] if found.out_of_time else []), *left_out, *refused),
        )

    def _say(self, text: str) -> None:
        self.tell(text, min(1.0, (self.now() - self._began) / (self._end - self._began)))

    def _opened(self, stack: ExitStack, choice: Choice) -> Rig:
        rig = self.open_rig(self._with(choice))
        stack.callback(rig.close)
        return rig

    def _with(self, choice: Choice) -> EngineSettings:
        # Through the constructor, so that fields are known to be set, and values are checked.
        return EngineSettings(**{**self._base.model_dump(exclude_unset=True), **choice})

    def _convert(self, source: Path, kind: ProjectorType) -> Path | None:
        if self.now() >= self._deadline:
            return None
        self._say(f"writing {source.name} as {kind}")
        return self.convert(source, kind)

    def _trial(self, choice: Choice, part: Part) -> RigTrial:
        rig = self.open_rig(self._with(choice))
        try:
            return RigTrial(rig, part, self._sequences, self._pieces)
        except BaseException:
            rig.close()
            raise

    def _admit(self, choice: Choice) -> str | None:
        key = repr(choice)
        if key not in self._checks:
            with ExitStack() as stack:
                rig = self._opened(stack, choice)
                self._checks[key] = judge(self._before, rig, encoder=bool(_ENCODER & choice.keys()))
        return None if self.wish.allow_approximate else self._checks[key][0]

    def _takes(self, rounds: int) -> float:
        """Seconds that so many rounds of two rigs take, about, with loading and warming up."""
        one, many = self._pieces.cost.latency, self._sequences * self._pieces.cost.batch
        alone = len(workloads(self._sequences)[0].asks)
        return 2 * (self._load + one + rounds * (alone * one + many))

    def _finals(self, found: Found) -> tuple[tuple[Point, ...], list[str]]:
        """The untuned point and those of the finalists, each of which plays against the untuned settings."""
        choices = self._finalists(found)
        notes = [] if choices else ["nothing that was tried won: no finals"]
        played: dict[str, Final] = {}
        # Behind them comes the check of what is picked.
        end = self._end - self._takes(CONFIRM) - self._check_seconds
        for others, (name, choice) in zip(range(len(choices) - 1, -1, -1), choices.items(), strict=True):
            if self.now() + self._takes(LEAST_ROUNDS) > end:
                notes.append(f"{name} is left out of the finals: no time was left")
                continue
            self._say(f"{name} against the untuned settings")
            try:
                played[name] = self._play(choice, end=end - others * self._takes(LEAST_ROUNDS))
            except OpsinError as error:
                notes.append(f"{name} is left out of the finals: {error}")
        untuned = [final.untuned for final in played.values()] or [self._pieces.cost]
        one, many = median(cost.latency for cost in untuned), median(cost.batch for cost in untuned)
        rivals = (
            Point(name, one * f.latency.value, 1.0 / (many * f.batch.value), f.latency, f.batch, choices[name])
            for name, f in played.items()
        )
        return (Point("untuned", one, 1.0 / many), *rivals), notes

    def _finalists(self, found: Found) -> dict[str, Choice]:
        choices: dict[str, Choice] = {}
        # The balanced one first: where the others are the same, it has the name.
        for name, objective in (("balanced", "both"), ("best latency", "latency"), ("best throughput", "throughput")):
            choice = found.best[objective]  # type: ignore[index]
            if choice and choice not in choices.values():
                choices[name] = choice
        if self.wish.profile == "throughput" and self._sequences > 1:
            for name, share in SHARING.items():
                if not share.keys() & self.wish.fixed:
                    choices[name] = {**found.best["throughput"], **share}
        return choices

    def _play(self, choice: Choice, *, rounds: int = ROUNDS, first: int = 0, end: float = math.inf) -> Final:
        with ExitStack() as stack:
            untuned, other = self._opened(stack, {}), self._opened(stack, choice)
            return play_final(
                untuned.driver,
                other.driver,
                workloads(self._sequences),
                noise=self._noise,
                rounds=rounds,
                first=first,
                may_go_on=lambda seconds: self.now() + seconds < end,
                now=self.now,
            )

    def _admitted(self, points: tuple[Point, ...]) -> tuple[tuple[Point, ...], Point, list[str]]:
        """The best whose answers are near enough as a whole and that wins further rounds; why others are not taken.

        Its figures are then those of the further rounds: the rounds that chose it are the lucky ones.
        """
        left = list(points)
        refused: list[str] = []
        mine = "latency" if self.wish.profile == "interactive" else "batch"
        while (picked := pick(left, self.wish.profile)) is not points[0]:
            self._say(f"checking {picked.name}")
            try:
                late = self.now() + self._check_seconds + self._takes(CONFIRM) > self._end
                why = "no time was left to check it" if late else self._admit(picked.choice)
                if why is None:
                    again = self._play(picked.choice, rounds=CONFIRM, first=ROUNDS)
                    confirmed = replace(picked, latency=again.latency, batch=again.batch)
                    if getattr(again, mine).value < 1.0 - LEAST_GAIN:
                        return tuple(confirmed if p is picked else p for p in points), confirmed, refused
                    why = "further rounds did not bear it out"
            except OpsinError as error:
                why = str(error)
            refused.append(f"{picked.name} was best, but {why}")
            left.remove(picked)
        return points, picked, refused

    def _worth_saying(self, choice: Choice) -> Choice:
        """The choice as a file should say it: with all numbers of threads, if one is tuned."""
        said = {name: getattr(self._base, name) for name in _THREADS} if choice.keys() & set(_THREADS) else {}
        return {**said, **choice}


def tried_text(tried: Tried) -> str:
    """One line on what a candidate gave: times over the incumbent's."""
    if not tried.ratios:
        return f"{tried.dimension}: {shown(tried.choice)}: {tried.verdict}"
    one, many = tried.ratios["latency"], tried.ratios["throughput"]
    return (
        f"{tried.dimension}: {shown(tried.choice)}: {tried.verdict} (one question x{one.value:.3f} ±{one.noise:.3f}, "
        f"many at once x{many.value:.3f} ±{many.noise:.3f}, {tried.rounds} rounds)"
    )
