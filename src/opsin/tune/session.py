"""One tuning from beginning to end: survey, search, finals, choice."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opsin.core.errors import OpsinError
from opsin.core.settings import EngineSettings, Profile
from opsin.tune.finals import ROUNDS, driver_of, measure_finals, workloads
from opsin.tune.pareto import Point, pareto, pick
from opsin.tune.projector import ProjectorType, convert_projector
from opsin.tune.rig import OpenRig, Pieces, Rig, RigTrial, laid_out, survey
from opsin.tune.search import Choice, Found, Part, Search, Tried, shown
from opsin.tune.space import Ground, dimensions, sharing
from opsin.tune.tolerance import Reference, judge, reference

SEARCH_SHARE = 0.5
"""Of the time goes to the search; the finals take what they need of the rest."""
_ROOM = 256  # tokens of a prompt's text and of the answer
_CTX = 2048  # from so many a sequence the engine lays its memory out as with more
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
        return {
            "kind": "tune",
            "profile": self.profile,
            "seconds": round(self.seconds, 1),
            "noise": round(self.noise, 4),
            "untuned_pieces_s": {name: round(value, 5) for name, value in asdict(self.pieces).items()},
            "tried": [
                {
                    "what": tried.dimension,
                    "choice": _plain(tried.choice),
                    "verdict": tried.verdict,
                    "rounds": tried.rounds,
                    "ratios": {o: [round(r.value, 4), round(r.noise, 4)] for o, r in tried.ratios.items()},
                }
                for tried in self.tried
            ],
            "finalists": [
                {
                    "name": point.name,
                    "choice": _plain(point.choice),
                    "seconds_of_one": round(point.latency_s, 4),
                    "answers_a_second": round(point.answers_s, 4),
                    "latency_ratio": [round(point.latency.value, 4), round(point.latency.noise, 4)],
                    "batch_ratio": [round(point.batch.value, 4), round(point.batch.noise, 4)],
                    "pareto": point in self.front,
                }
                for point in self.points
            ],
            "picked": self.picked.name,
            "settings": _plain(self.settings),
            "checks": self.checks,
            "notes": list(self.notes),
        }


def _plain(choice: Choice) -> dict[str, Any]:
    return {name: value.name if isinstance(value, Path) else value for name, value in choice.items()}


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wanted of a tuning; `fixed` are settings that the user chose and that stay."""

    profile: Profile
    fixed: frozenset[str] = frozenset()
    minutes: float = 10.0
    allow_approximate: bool = False
    cores: int = 1
    gpus: tuple[str, ...] = ()


class Tuning:
    """Opens engines with the settings to be tried. `settings` are the untuned ones, with model and projector."""

    def __init__(
        self,
        open_rig: OpenRig,
        settings: EngineSettings,
        wish: Wish,
        *,
        convert: Callable[[Path, ProjectorType], Path | None] = convert_projector,
        now: Callable[[], float] = time.monotonic,
        tell: Callable[[str, float], None] = lambda _text, _share: None,
    ) -> None:
        self._open_rig = open_rig
        self._untuned = settings
        self._wish = wish
        self._convert = convert
        self._now = now
        self._began = now()
        self._tell = tell
        self._checks: dict[str, tuple[str | None, str]] = {}

    def run(self) -> Report:
        """Measure, and choose. Raises what opening the untuned settings raises."""
        wish = self._wish
        self._say("loading")
        settings, threads = self._sized()
        # The untuned numbers of threads, said aloud: one of them left out would follow another that is tried.
        self._base = settings.model_copy(update=dict(zip(_THREADS, threads, strict=True)))
        with ExitStack() as stack:
            rig = self._opened(stack, {})
            self._say("measuring the untuned settings")
            self._pieces, noise = survey(rig, self._sequences)
            before = reference(rig)
            with laid_out(rig, 0) as layout:
                tokens = layout.n_image_tokens
            ground = Ground(wish.cores, wish.gpus, rig.engine.limits, tokens, self._base.mmproj)
            space = dimensions(ground, wish.fixed, self._convert, allow_approximate=wish.allow_approximate)
            search = Search(
                self._trial,
                noise=noise,
                deadline=self._began + SEARCH_SHARE * 60 * wish.minutes,
                now=self._now,
                untuned={name: getattr(self._base, name) for name in _THREADS},
                admit=lambda choice: self._admit(choice, before),
                tell=self._say,
            )
            found = search.run(space)
            points, notes = self._finals(stack, rig, found)
            picked, refused = self._admitted(points, before)
        told = self._checks.get(repr(picked.choice), (None, ""))[1]
        return Report(
            profile=wish.profile,
            pieces=self._pieces,
            noise=noise,
            tried=found.tried,
            points=points,
            picked=picked,
            seconds=self._now() - self._began,
            settings=self._worth_saying(picked.choice),
            checks=told,
            notes=(*(["the time was over before all was tried"] if found.out_of_time else []), *notes, *refused),
        )

    @property
    def _sequences(self) -> int:
        return min(8, self._base.parallel)

    def _say(self, text: str) -> None:
        self._tell(text, min(1.0, (self._now() - self._began) / (60 * self._wish.minutes)))

    def _sized(self) -> tuple[EngineSettings, tuple[int, int, int]]:
        """The untuned settings with a context just large enough, so that several engines fit; and their threads."""
        chosen = self._untuned.ctx
        settings = self._untuned.model_copy(
            update={"disk_cache": False, "ctx": chosen or _CTX * self._untuned.parallel}
        )
        rig = self._open_rig(settings)
        try:
            with laid_out(rig, 0) as layout:
                needed = (layout.n_tokens + _ROOM) * settings.parallel
            threads = rig.threads
        finally:
            rig.close()
        return settings.model_copy(update={"ctx": chosen or max(settings.ctx or 0, needed)}), threads

    def _opened(self, stack: ExitStack, choice: Choice) -> Rig:
        rig = self._open_rig(self._with(choice))
        stack.callback(rig.close)
        return rig

    def _with(self, choice: Choice) -> EngineSettings:
        # Through the constructor, so that fields are known to be set, and values are checked.
        return EngineSettings(**{**self._base.model_dump(exclude_unset=True), **choice})

    def _trial(self, choice: Choice, part: Part) -> RigTrial:
        return RigTrial(self._open_rig(self._with(choice)), part, self._sequences, self._pieces)

    def _admit(self, choice: Choice, before: Reference) -> str | None:
        key = repr(choice)
        if key not in self._checks:
            with ExitStack() as stack:
                rig = self._opened(stack, choice)
                self._checks[key] = judge(before, rig, encoder=bool(_ENCODER & choice.keys()))
        return None if self._wish.allow_approximate else self._checks[key][0]

    def _admitted(self, points: tuple[Point, ...], before: Reference) -> tuple[Point, list[str]]:
        """The best whose answers are near enough as a whole, and why better ones are not taken."""
        left, refused = list(points), []
        while (picked := pick(left, self._wish.profile)) is not points[0]:
            why = self._admit(picked.choice, before)
            if why is None:
                break
            refused.append(f"{picked.name} was best, but {why}")
            left.remove(picked)
        return picked, refused

    def _finals(self, stack: ExitStack, untuned: Rig, found: Found) -> tuple[tuple[Point, ...], list[str]]:
        choices: dict[str, Choice] = {"untuned": {}}
        # The balanced one first: where the others are the same, it has the name.
        for name, objective in (("balanced", "both"), ("best latency", "latency"), ("best throughput", "throughput")):
            choice = found.best[objective]  # type: ignore[index]
            if choice and choice not in choices.values():
                choices[name] = choice
        if self._wish.profile == "throughput" and self._sequences > 1:
            best = found.best["throughput"]
            for name, share in sharing():
                if not share.keys() & self._wish.fixed:
                    choices[name] = {**best, **share}
        if len(choices) == 1:
            pieces = self._pieces.cost
            return (Point("untuned", pieces.latency, 1.0 / pieces.batch),), ["nothing that was tried won: no finals"]
        drivers, notes = {"untuned": driver_of(untuned)}, []
        for name, choice in list(choices.items())[1:]:
            try:
                drivers[name] = driver_of(self._opened(stack, choice))
            except OpsinError as error:
                notes.append(f"{name} is left out of the finals: {error}")
        end = self._began + 60 * self._wish.minutes
        points = measure_finals(
            drivers,
            choices,
            workloads(self._sequences),
            rounds=ROUNDS,
            may_go_on=lambda seconds: self._now() + seconds < end,
            now=self._now,
            tell=self._say,
        )
        return points, notes

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
