"""The numbers the scheduler decides by, in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """Tunable numbers; times in seconds, sizes in tokens.

    `slice` bounds a prefill step while somebody's answer streams: it bounds the pause of that stream. `turn` is how
    long streams wait at most for their next token while pictures are worked on; a shorter one makes them smoother and
    new pictures slower. `wait_for` is how much longer a coming prefix must be than the one that is ready, for a
    request to wait for it. `max_queue` requests may wait.
    """

    parallel: int = 1
    slice: int = 64
    turn: float = 0.06
    wait_for: int = 32
    max_queue: int = 256
    keep_prefixes: bool = True
    idle_slowdown: float = 0.05
