"""The stage clock: every millisecond of a request belongs to exactly one stage.

The wall time since `start` is cut into intervals, each given to the stage that ran in it, or to `other` when no stage
did. What happened before the start (a model loaded, a picture fetched and decoded before the request was submitted) is
measured elsewhere and handed in by `add`. The total grows by as much, since the caller waited for it too;
`waited_since` says how long that really was, when things were done side by side.

A native stage ends after the backend's `synchronize`: the clock cannot know that, its caller must.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opsin.core.answer import Timings
from opsin.core.stages import Interval, Stage, Stages
from opsin.engine.intervals import Intervals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class StageClock:
    """The stage clock of one request. One thread at a time may use it; `now` gives seconds that never go back."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds = dict.fromkeys(Stage, 0.0)
        self._running: list[Stage] = [Stage.OTHER]
        self._started: float | None = None
        self._mark = 0.0
        self._before: dict[Stage, float] = {}
        self._intervals = Intervals()
        self._open = Stage.OTHER
        self._opened = 0.0

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

    def switch(self, stage: Stage) -> None:
        """From now on `stage` runs in place of the innermost one; Stage.OTHER means that none does."""
        self._settle()
        self._running[-1] = stage

    def add(self, stage: Stage, ms: float) -> None:
        """Count `ms` milliseconds that passed before the start; negative ones are taken as none."""
        seconds = max(0.0, ms) / 1e3
        self._seconds[stage] += seconds
        self._before[stage] = self._before.get(stage, 0.0) + seconds

    def waited_since(self, began: float) -> None:
        """The caller has waited since `began`, in seconds of this clock; call it after `add` and before the start.

        Pictures that were loaded side by side are given less each, so that they add up to no more than that; time for
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
        """The account up to now; the clock runs on."""
        if self._started is not None:
            self._settle()
        wall = 0.0 if self._started is None else self._mark - self._started
        return Stages(
            **{f"{stage.value}_ms": seconds * 1e3 for stage, seconds in self._seconds.items()},
            total_ms=(wall + sum(self._before.values())) * 1e3,
        )

    def intervals(self) -> tuple[Interval, ...]:
        """When each stage ran, up to the last `freeze`; what was added is laid end to end before the start."""
        before, end = Intervals(), self._started or 0.0
        for stage, seconds in reversed(self._before.items()):
            before.add(stage, end - seconds, end)
            end -= seconds
        last = Intervals()
        last.add(self._open, self._opened, self._mark)
        return before.told() + self._intervals.told() + last.told()

    def _settle(self) -> None:
        """Give the time since the last mark to the stage that ran in it."""
        self.start()
        now, stage = self._now(), self._running[-1]
        self._seconds[stage] += now - self._mark
        if stage is not self._open and now > self._mark:
            # An interval goes on through stages that took no time.
            self._intervals.add(self._open, self._opened, self._mark)
            self._open, self._opened = stage, self._mark
        self._mark = now


def timings(stages: Stages, *, prompt_tokens: int, cached_tokens: int, predicted_tokens: int) -> Timings:
    """llama-server's `timings` of one request, from its stages and counts.

    `prompt_tokens` counts the whole prompt, `cached_tokens` the part found in the KV memory; as in llama-server
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
