"""The numbers the scheduler decides by, in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """Tunable numbers; times in seconds, sizes in tokens.

    While somebody's answer streams a prefill step takes about `slice_seconds`, which bounds the pause of that stream,
    and has `slice` rows until it is known how long a row takes. While pictures are worked on, streams wait for their
    next token as long as makes their steps cost `turn_share` of the time, but at least `turn` and at most
    `longest_turn`: shorter ones make them smoother and new pictures slower. When more than `few` are served at a time,
    waits and slices grow with the square of that, up to `crowded_turn`: the more streams there are, the more a step of
    theirs costs, and the more wait for it; and all decode cheapest together, when all prompts are filled. `wait_for` is
    how much longer a coming prefix must be than the one that is ready, for a request to wait for it. Requests that
    share `gather` cells or more with one that is being answered go to the common memory with it. `max_queue` requests
    may wait.
    """

    parallel: int = 1
    slice: int = 64
    slice_seconds: float = 0.27
    turn: float = 0.03
    longest_turn: float = 0.25
    few: int = 4
    crowded_turn: float = 0.8
    turn_share: float = 0.05
    wait_for: int = 32
    gather: int = 256
    max_queue: int = 256
    keep_prefixes: bool = True
    idle_slowdown: float = 0.05
