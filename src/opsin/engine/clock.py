"""The stage clock: wall time of a request, cut into disjoint pieces that each belong to one stage.

A request has a `StageClock` of its own until it decodes. Those that decode share every step, so they share one
`GroupClock`, which is read once a stage and step however many they are.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from opsin.core.answer import Interval, Stage, Stages, Timings
from opsin.engine.draft import Drafter

Now = Callable[[], float]


class GroupClock:
    """The stages of all that decode: seconds of each, and how often it ran."""

    def __init__(self, now: Now = time.perf_counter) -> None:
        self._now = now
        self._stage = Stage.OTHER
        self._mark = now()
        self.seconds = dict.fromkeys(Stage, 0.0)
        self.counts = dict.fromkeys(Stage, 0)

    def switch(self, stage: Stage, now: float | None = None) -> None:
        """From `now` on (the clock is read where it is not given) `stage` runs."""
        if stage is not self._stage:
            self.settle(now)
            self._stage = stage
            self.counts[stage] += 1

    def settle(self, now: float | None = None) -> float:
        """Count the stage that is running up to now; gives the time."""
        now = self._now() if now is None else now
        self.seconds[self._stage] += now - self._mark
        self._mark = now
        return now


class StageClock:
    """The account of one request.

    Exactly one stage runs at a time once the clock was started, `Stage.OTHER` where nothing else does, so the stages
    add up to the total. Used by one thread at a time.
    """

    def __init__(self, now: Now = time.perf_counter) -> None:
        self._now = now
        self._started: float | None = None
        self._mark = 0.0
        self._running = [Stage.OTHER]
        self._before: dict[Stage, float] = {}
        self._ran: dict[Stage, Interval] = {}
        self._group: GroupClock | None = None
        self._joined: tuple[dict[Stage, float], dict[Stage, int]] = ({}, {})

    def start(self) -> None:
        """The request's wall time begins; a second call changes nothing. A first stage starts the clock by itself."""
        if self._started is None:
            self._started = self._mark = self._now()

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Give the time of a block to a stage; the stage around it waits until the block is left."""
        self._settle()
        self._running.append(stage)
        try:
            yield
        finally:
            self._settle()
            self._running.pop()

    def switch(self, stage: Stage, now: float | None = None) -> None:
        """From now on `stage` runs in place of the innermost one; nothing while a group's clock runs for it."""
        if self._group is None and stage is not self._running[-1]:
            self._settle(now)
            self._running[-1] = stage

    def join(self, group: GroupClock) -> None:
        """From now on the group's stages are this request's; joining again changes nothing."""
        if self._group is None:
            self._settle(group.settle())
            self._group = group
            self._joined = (group.seconds.copy(), group.counts.copy())

    def leave(self) -> None:
        """The group's stages are this request's no more; nothing where they were not."""
        group, self._group = self._group, None
        if group is None:
            return
        now, (seconds, counts) = group.settle(), self._joined
        for stage in Stage:
            spent = group.seconds[stage] - seconds[stage]
            self._add(stage, self._mark, now, spent, max(1, group.counts[stage] - counts[stage]))
        self._mark = now

    def add(self, stage: Stage, ms: float) -> None:
        """Count `ms` milliseconds that passed before the start; negative ones are taken as none."""
        self._before[stage] = self._before.get(stage, 0.0) + max(0.0, ms) / 1e3

    def waited_since(self, began: float) -> None:
        """The caller has waited since `began`, in seconds of this clock; call it after `add` and before the start.

        Images that were loaded side by side are given less each, so that they add up to no more than that; time for
        which nothing was added is `other`.
        """
        wall, before = max(0.0, self._now() - began), self._before
        fixed = before.get(Stage.LOAD, 0.0) + before.get(Stage.QUEUE, 0.0)  # these are not done side by side
        added = sum(before.values())
        if added <= wall:
            self.add(Stage.OTHER, (wall - added) * 1e3)
        elif added > fixed:
            share = max(0.0, wall - fixed) / (added - fixed)
            for stage in before.keys() - {Stage.LOAD, Stage.QUEUE}:
                before[stage] *= share

    def freeze(self) -> Stages:
        """The account up to now; the clock runs on. A request that decodes must have left its group."""
        if self._started is not None:
            self._settle()
        total = sum(self._before.values()) + (0.0 if self._started is None else self._mark - self._started)
        spent = {stage: self._before.get(stage, 0.0) for stage in Stage}
        for stage, ran in self._ran.items():
            spent[stage] += ran.seconds
        return Stages(**{f"{stage.value}_ms": seconds * 1e3 for stage, seconds in spent.items()}, total_ms=total * 1e3)

    def intervals(self) -> tuple[Interval, ...]:
        """When each stage ran, up to the last `freeze`; what was added lies end to end before the start."""
        told, end = list(self._ran.values()), self._started or 0.0
        for stage, seconds in reversed(self._before.items()):
            if seconds:
                told.append(Interval(stage, end - seconds, end, seconds))
            end -= seconds
        return tuple(sorted(told, key=lambda interval: interval.start))

    def _settle(self, now: float | None = None) -> None:
        """Give the time since the last mark to the stage that ran in it."""
        self.start()
        now = self._now() if now is None else now
        self._add(self._running[-1], self._mark, now, now - self._mark)
        self._mark = now

    def _add(self, stage: Stage, start: float, end: float, seconds: float, count: int = 1) -> None:
        ran = self._ran.get(stage)
        if ran is None and seconds:
            self._ran[stage] = Interval(stage, start, end, seconds, count)
        elif ran is not None and seconds:
            more = count if start > ran.end else count - 1  # it goes on through stages that took no time
            self._ran[stage] = Interval(stage, ran.start, end, ran.seconds + seconds, ran.count + more)


def stage_row(stages: Stages) -> dict[str, float]:
    """Milliseconds by stage as plain numbers, rounded to the microsecond."""
    return {name: round(value, 3) for name, value in asdict(stages).items()}


def timings(
    stages: Stages, *, prompt_tokens: int, cached_tokens: int, predicted_tokens: int, drafter: Drafter | None = None
) -> Timings:
    """llama-server's `timings` of one request, from its stages and counts.

    `prompt_tokens` counts the whole prompt, `cached_tokens` the part found in the KV cache; as in llama-server
    `prompt_n` is what had to be computed, and the vision encoder's time is part of `prompt_ms`. Rates of nothing
    are 0.
    """
    prompt_n = max(0, prompt_tokens - cached_tokens)
    prompt_ms = stages.encode_ms + stages.image_prefill_ms + stages.text_prefill_ms
    predicted_ms = stages.decode_ms + stages.sample_ms + stages.detokenize_ms
    return Timings(
        cache_n=cached_tokens,
        prompt_n=prompt_n,
        prompt_ms=prompt_ms,
        prompt_per_token_ms=prompt_ms / prompt_n if prompt_n else 0.0,
        prompt_per_second=prompt_n * 1e3 / prompt_ms if prompt_ms > 0 else 0.0,
        predicted_n=predicted_tokens,
        predicted_ms=predicted_ms,
        predicted_per_token_ms=predicted_ms / predicted_tokens if predicted_tokens else 0.0,
        predicted_per_second=predicted_tokens * 1e3 / predicted_ms if predicted_ms > 0 else 0.0,
        draft_n=0 if drafter is None else drafter.drafted,
        draft_n_accepted=0 if drafter is None else drafter.accepted,
    )
