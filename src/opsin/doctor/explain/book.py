"""Puts the lines of a log together to requests."""

from __future__ import annotations

import math
from typing import Any

from opsin.doctor.explain.facts import Batch, Request

KEPT = 1000
"""Requests kept of a long log, besides the slowest and the last."""
_MANY = 256
"""Images and batches kept of one request."""


class Book:
    """Puts lines together to requests: a value that a request has already, and otherwise, begins the next one."""

    def __init__(self) -> None:
        self.done: list[Request] = []
        self.count = 0
        self.slowest: Request | None = None
        self._open: dict[str, dict[str, Any]] = {}
        self._task = ""

    def task(self, task: str) -> None:
        """The lines that follow are about this one."""
        self._task = task
        if len(self._open) > KEPT:
            self._close(next(iter(self._open)))

    def put(self, line: int, **values: Any) -> None:
        """Add values that a request has once."""
        kept = {name: value for name, value in values.items() if value is not None and _finite(value)}
        current = self._current(line)
        if any(name in current and current[name] != value for name, value in kept.items() if name != "timer"):
            self._close(self._task)
            current = self._current(line)
        current.update(kept)

    def once(self, line: int, **values: Any) -> None:
        """Add values that belong to the request in hand whatever it has; the first ones stay."""
        for name, value in values.items():
            if value is not None and _finite(value):
                self._current(line).setdefault(name, value)

    def image(self, line: int, *, encode_ms: float | None = None, batch: Batch | None = None) -> None:
        """Add an encode or a batch of an image."""
        current = self._current(line, event=True)
        if encode_ms is not None and math.isfinite(encode_ms):
            current["encode_ms"] = (*current.get("encode_ms", ()), encode_ms)[:_MANY]
        if batch is not None and math.isfinite(batch.ms):
            current["batches"] = (*current.get("batches", ()), batch)[:_MANY]

    def add(self, line: int, name: str, amount: int) -> None:
        """Count an event of the request in hand, or its image tokens."""
        current = self._current(line, event=True)
        current[name] = current.get(name, 0) + amount

    def stage(self, line: int, name: str, ms: float) -> None:
        """Add a stage of Opsin's own account."""
        stages = self._current(line).get("stages", {})
        if name in stages and stages[name] != ms:
            self._close(self._task)
            stages = {}
        if math.isfinite(ms):
            self._current(line)["stages"] = {**stages, name: ms}

    def has(self, name: str) -> bool:
        """The request in hand has this value already."""
        return name in self._open.get(self._task, {})

    def finish(self) -> None:
        """The request in hand is over."""
        self._close(self._task)

    def end(self) -> None:
        """No more lines."""
        for task in list(self._open):
            self._close(task)

    def _current(self, line: int, *, event: bool = False) -> dict[str, Any]:
        if event and (self.has("eval_ms") or self.has("total_ms")):
            # What happens after the timers of a request belongs to the next one.
            self._close(self._task)
        return self._open.setdefault(self._task, {"line": line})

    def _close(self, task: str) -> None:
        request = Request(**self._open.pop(task, {}))
        if not request.tells:
            return
        self.count += 1
        if len(self.done) < KEPT:
            self.done.append(request)
        if self.slowest is None or request.whole >= self.slowest.whole:
            self.slowest = request


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
