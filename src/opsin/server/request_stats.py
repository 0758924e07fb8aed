"""What is known about one HTTP request: the log, the metrics and the trace are written from it."""

from __future__ import annotations

import itertools
import time
import uuid
from dataclasses import dataclass, field
from typing import Protocol

from opsin.core.answer import Answer


@dataclass(slots=True)
class RequestStats:
    """Filled in while the request runs. Times are `time.perf_counter()`; `began_at` is Unix time.

    `key` is the label of the API key, never the key. `refused` is the error code when there was no complete answer.
    `deltas` holds the times at which pieces of text went out, one list per choice.
    """

    route: str
    key: str = ""
    model: str = ""
    streamed: bool = False
    traceparent: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.perf_counter)
    began_at: float = field(default_factory=time.time)
    ended: float = 0.0
    status: int = 200
    refused: str | None = None
    images: int = 0
    answers: list[Answer] = field(default_factory=list)
    deltas: list[list[float]] = field(default_factory=list)

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the start of the request to the first piece of text; None if there was none."""
        first = min((times[0] for times in self.deltas if times), default=None)
        return None if first is None else first - self.began

    @property
    def longest_pause_s(self) -> float:
        """The longest time between two pieces of text of one choice, in seconds."""
        return max((b - a for times in self.deltas for a, b in itertools.pairwise(times)), default=0.0)


class Watcher(Protocol):
    """Told about each request once, when it has ended."""

    def finished(self, stats: RequestStats) -> None:
        """Take note. Must be quick and never raise."""
        ...
