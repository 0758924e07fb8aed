"""One request as a log tells it, and the book in which its lines are put together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

KEPT = 1000
"""Requests kept of a long log, besides the slowest and the last."""
_FEW = 3
"""Stages that make an account of Opsin; any program may print one "total_ms"."""
_MANY = 256
"""Pictures and batches kept of one request."""
Timer = Literal["print_timings", "perf", "server", "ollama", "opsin", ""]


@dataclass(frozen=True, slots=True)
class Batch:
    """A stretch of a picture's embeddings in the language model: `index` of `count`, tokens (None: not told), ms."""

    index: int
    count: int
    tokens: int | None
    ms: float


@dataclass(frozen=True, slots=True)
class Request:
    """What one request says of itself; None where the log is silent. Times in milliseconds.

    `prompt_ms`, `eval_ms`, `sample_ms` and `total_ms` are the tool's own timers, `wall_ms` what its caller measured.
    `prompt_n` and `eval_n` are what the timers counted, `prompt_tokens` and `completion_tokens` what `usage` says.
    `encode_ms` has one entry a picture or slice. `end_tokens` is the fill of the context when it stopped, `kv_full` how
    often a batch found no cells. `line` is where it began.
    """

    line: int = 0
    timer: Timer = ""
    load_ms: float | None = None
    prompt_ms: float | None = None
    eval_ms: float | None = None
    sample_ms: float | None = None
    total_ms: float | None = None
    wall_ms: float | None = None
    prompt_n: int | None = None
    eval_n: int | None = None
    sample_n: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    image_tokens: int | None = None
    processed_ms: float | None = None
    n_ctx: int | None = None
    end_tokens: int | None = None
    finish: str | None = None
    truncated: bool = False
    shifts: int = 0
    kv_full: int = 0
    reprocessed: bool = False
    encode_ms: tuple[float, ...] = ()
    batches: tuple[Batch, ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def tells(self) -> bool:
        """It holds a time of a stage, or an event; a lone "took 5 s" may be anybody's."""
        timers = (self.prompt_ms, self.eval_ms, self.total_ms, self.processed_ms, self.wall_ms if self.timer else None)
        events = self.shifts or self.reprocessed or self.truncated or self.kv_full > 0
        return any(timers) or bool(self.image or events) or len(self.stages) >= _FEW

    @property
    def answer_n(self) -> int | None:
        """Tokens of the answer: usage's count, else the timer's, which may leave the first one out."""
        return self.completion_tokens if self.completion_tokens is not None else self.eval_n

    @property
    def encoded(self) -> float:
        """Milliseconds in the vision encoder, 0 where the log shows none."""
        if self.encode_ms or self.processed_ms is None:
            return sum(self.encode_ms)
        return max(0.0, self.processed_ms - self.decoded)

    @property
    def decoded(self) -> float:
        """Milliseconds of the picture's prefill; batches that were cut out of the log at the mean of the others."""
        if not self.batches:
            return 0.0
        count = max(len(self.batches), *(batch.count for batch in self.batches))
        return sum(batch.ms for batch in self.batches) * count / len(self.batches)

    @property
    def before_timer(self) -> float | None:
        """Milliseconds of wall time before the timers were set to zero: picture and prompt, in some handlers."""
        if self.wall_ms is None or self.total_ms is None or self.total_ms > self.wall_ms:
            return None
        return self.wall_ms - self.total_ms if self.hidden_prompt else None

    @property
    def hidden_prompt(self) -> bool:
        """The timers were reset after the prompt: they count at most its last token."""
        return (self.prompt_n or 0) <= 1 < (self.prompt_tokens or 0)

    @property
    def whole(self) -> float:
        """Milliseconds from first to last, by the best witness there is."""
        parts = sum(x or 0.0 for x in (self.load_ms_of_request, self.prompt_only, self.image, self.rest))
        return self.wall_ms or max(self.total_ms or 0.0, parts)

    @property
    def load_ms_of_request(self) -> float:
        """Loading that the request waited for: llama.cpp's own "load time" is none of it."""
        return (self.load_ms or 0.0) if self.timer in {"ollama", "opsin", ""} else 0.0

    @property
    def image(self) -> float:
        """Milliseconds of the picture that are known: encoder and prefill."""
        return self.encoded + self.decoded

    @property
    def prompt_only(self) -> float:
        """The prompt's timer without the picture: servers, and llama.cpp's newer timers, count the picture in."""
        prompt = self.prompt_ms or 0.0
        holds_picture = self.timer in {"server", "perf", "ollama"} and prompt >= self.image
        return prompt - self.image if holds_picture else prompt

    @property
    def rest(self) -> float:
        """Milliseconds of the answer: decode and sampling."""
        return (self.eval_ms or 0.0) + (self.sample_ms or 0.0)


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

    def picture(self, line: int, *, encode_ms: float | None = None, batch: Batch | None = None) -> None:
        """Add an encode or a batch of a picture."""
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
