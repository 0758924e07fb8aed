"""The stage clock: wall time of a request, cut into disjoint intervals that each belong to one stage.

A request has a `StageClock` of its own until it decodes. Those that decode share every step, so they share one
`GroupClock`, which is read once a stage and step however many they are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opsin.core.answer import Timings
from opsin.core.stages import Interval, Stage, Stages

Now = Callable[[], float]

_APART = 512
"""Intervals of a request that are told apart; those of a stage behind them are told as one."""

_PAUSE_SECONDS = 0.02
_PAUSES = 1024


class GroupClock:
    """The stages of all that decode, in seconds since the start of the engine.

    Pauses of `_PAUSE_SECONDS` and more, in which others were computed for, are remembered one by one.
    """

    def __init__(self, now: Now = time.perf_counter) -> None:
        self._now = now
        self._stage = Stage.OTHER
        self._mark = self._opened = now()
        self.seconds = dict.fromkeys(Stage, 0.0)
        self.counts = dict.fromkeys(Stage, 0)
        self.last: dict[Stage, tuple[float, float]] = {}
        self.pauses: deque[tuple[float, float]] = deque(maxlen=_PAUSES)

    def switch(self, stage: Stage, now: float | None = None) -> None:
        """From `now` on (the clock is read where it is not given) `stage` runs."""
        if stage is not self._stage:
            self.settle(now)
            self._stage = stage

    def settle(self, now: float | None = None) -> float:
        """Count the interval that is running up to now; gives the time."""
        now = self._now() if now is None else now
        stage, opened = self._stage, self._opened
        if now > opened:
            self.seconds[stage] += now - opened
            self.counts[stage] += 1
            if stage is Stage.QUEUE and now - opened >= _PAUSE_SECONDS:
                self.pauses.append((opened, now))
            else:
                self.last[stage] = (opened, now)
        self._opened = now
        return now


class StageClock:
    """The account of one request.

    Exactly one stage runs at a time once the clock was started, `Stage.OTHER` where nothing else does, so the stages
    add up to the total. Used by one thread at a time.
    """

    def __init__(self, now: Now = time.perf_counter) -> None:
        self._now = now
        self._started: float | None = None
        self._mark = self._opened = 0.0
        self._open = Stage.OTHER
        self._running = [Stage.OTHER]
        self._seconds = dict.fromkeys(Stage, 0.0)
        self._before: dict[Stage, float] = {}
        self._intervals: list[Interval] = []
        self._group: GroupClock | None = None
        self._joined: tuple[dict[Stage, float], dict[Stage, int]] = ({}, {})

    def start(self) -> None:
        """The request's wall time begins; a second call changes nothing. A first stage starts the clock by itself."""
        if self._started is None:
            self._started = self._mark = self._opened = self._now()

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
        if self._group is not None:
            return
        self._settle(group.settle())
        self._end_interval()
        self._group = group
        self._joined = (group.seconds.copy(), group.counts.copy())

    def leave(self) -> None:
        """The group's stages are this request's no more; nothing where they were not."""
        group, self._group = self._group, None
        if group is None:
            return
        joined, now = self._mark, group.settle()
        seconds, counts = self._joined
        pauses = [Interval(Stage.QUEUE, *pause, pause[1] - pause[0]) for pause in group.pauses if pause[0] >= joined]
        for stage in Stage:
            spent, count = group.seconds[stage] - seconds[stage], group.counts[stage] - counts[stage]
            self._seconds[stage] += spent
            if stage is Stage.QUEUE:
                spent, count = spent - sum(pause.seconds for pause in pauses), count - len(pauses)
            if count == 1:
                self._intervals.append(Interval(stage, *group.last[stage], spent))
            elif count:
                self._intervals.append(Interval(stage, joined, now, spent, count))
        self._intervals += pauses
        self._mark = self._opened = now
        self._open = self._running[-1]

    def add(self, stage: Stage, ms: float) -> None:
        """Count `ms` milliseconds that passed before the start; negative ones are taken as none."""
        seconds = max(0.0, ms) / 1e3
        self._seconds[stage] += seconds
        self._before[stage] = self._before.get(stage, 0.0) + seconds

    def waited_since(self, began: float) -> None:
        """The caller has waited since `began`, in seconds of this clock; call it after `add` and before the start.

        Images that were loaded side by side are given less each, so that they add up to no more than that; time for
        which nothing was added is `other`.
        """
        wall = max(0.0, self._now() - began)
        fixed = (Stage.LOAD, Stage.QUEUE)  # these are not done side by side
        load = sum(self._before.get(stage, 0.0) for stage in fixed)
        added = sum(self._before.values())
        if added > wall:
            share = max(0.0, wall - load) / (added - load) if added > load else 0.0
            for stage in self._before.keys() - set(fixed):
                self._seconds[stage] = self._before[stage] = self._before[stage] * share
        else:
            self.add(Stage.OTHER, (wall - added) * 1e3)

    def freeze(self) -> Stages:
        """The account up to now; the clock runs on. A request that decodes must have left its group."""
        if self._started is not None:
            self._settle()
        wall = 0.0 if self._started is None else self._mark - self._started
        return Stages(
            **{f"{stage.value}_ms": seconds * 1e3 for stage, seconds in self._seconds.items()},
            total_ms=(wall + sum(self._before.values())) * 1e3,
        )

    def intervals(self) -> tuple[Interval, ...]:
        """When each stage ran, up to the last `freeze`, by beginning; what was added is laid end to end before."""
        told, end = list(self._intervals), self._started or 0.0
        for stage, seconds in reversed(self._before.items()):
            if seconds:
                told.append(Interval(stage, end - seconds, end, seconds))
            end -= seconds
        if self._mark > self._opened:
            told.append(Interval(self._open, self._opened, self._mark, self._mark - self._opened))
        told.sort(key=lambda interval: interval.start)
        return tuple(told[:_APART]) + _merged(told[_APART:])

    def _settle(self, now: float | None = None) -> None:
        """Give the time since the last mark to the stage that ran in it."""
        self.start()
        now, stage = self._now() if now is None else now, self._running[-1]
        self._seconds[stage] += now - self._mark
        if stage is not self._open and now > self._mark:
            # An interval goes on through stages that took no time.
            self._end_interval()
            self._open, self._opened = stage, self._mark
        self._mark = now

    def _end_interval(self) -> None:
        if self._mark > self._opened:
            self._intervals.append(Interval(self._open, self._opened, self._mark, self._mark - self._opened))
            self._opened = self._mark


def _merged(intervals: list[Interval]) -> tuple[Interval, ...]:
    """One interval a stage."""
    by_stage: dict[Stage, list[Interval]] = {}
    for interval in intervals:
        by_stage.setdefault(interval.stage, []).append(interval)
    return tuple(
        Interval(stage, each[0].start, each[-1].end, sum(i.seconds for i in each), sum(i.count for i in each))
        for stage, each in by_stage.items()
    )


def timings(stages: Stages, *, prompt_tokens: int, cached_tokens: int, predicted_tokens: int) -> Timings:
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
        prompt_per_token_ms=_ratio(prompt_ms, prompt_n),
        prompt_per_second=_ratio(prompt_n * 1e3, prompt_ms),
        predicted_n=predicted_tokens,
        predicted_ms=predicted_ms,
        predicted_per_token_ms=_ratio(predicted_ms, predicted_tokens),
        predicted_per_second=_ratio(predicted_tokens * 1e3, predicted_ms),
    )


def _ratio(value: float, by: float) -> float:
    return value / by if by > 0 else 0.0
