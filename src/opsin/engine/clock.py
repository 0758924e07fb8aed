"""The stage clock: every millisecond of a request belongs to exactly one stage.

The wall time since `start` is cut into intervals, each given to the stage that ran in it, or to `other` when no stage
did. Two kinds of time are measured elsewhere and handed in:

- before the start (a model loaded, a picture fetched and decoded before the request was submitted): `add`. The total
  grows by as much, since the caller waited for it too.
- after the start, in another thread, while this clock was running on some stage (a worker preprocessed the picture
  while the request stood in the queue): `claim`. The time moves from that stage to its own, and the total stays the
  wall time. Work of several workers at the same time cannot claim more than the wall time it happened in.

A native stage ends after the backend's `synchronize`: the clock cannot know that, its caller must.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opsin.core.answer import Timings
from opsin.core.stages import Stage, Stages

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
        self._before = 0.0

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

    def switch(self, stage: Stage) -> None:
        """From now on `stage` runs in place of the innermost one; Stage.OTHER means that none does."""
        self._settle()
        self._running[-1] = stage

    def add(self, stage: Stage, ms: float) -> None:
        """Count `ms` milliseconds that passed before the start; negative ones are taken as none."""
        seconds = max(0.0, ms) / 1e3
        self._seconds[stage] += seconds
        self._before += seconds

    def claim(self, stage: Stage, ms: float) -> None:
        """Move `ms` milliseconds, measured elsewhere, from the stage that is running now to `stage`.

        At most what the running stage has so far: no time is counted twice.
        """
        self._settle()
        source = self._running[-1]
        seconds = min(max(0.0, ms) / 1e3, self._seconds[source])
        self._seconds[source] -= seconds
        self._seconds[stage] += seconds

    def freeze(self) -> Stages:
        """The account up to now; the clock runs on."""
        if self._started is not None:
            self._settle()
        wall = 0.0 if self._started is None else self._mark - self._started
        return Stages(
            **{f"{stage.value}_ms": seconds * 1e3 for stage, seconds in self._seconds.items()},
            total_ms=(wall + self._before) * 1e3,
        )

    def _settle(self) -> None:
        """Give the time since the last mark to the stage that ran in it."""
        self.start()
        now = self._now()
        self._seconds[self._running[-1]] += now - self._mark
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
