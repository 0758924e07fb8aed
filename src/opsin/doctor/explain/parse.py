"""A log in, facts out: which tool wrote it, what it ran on, and its requests. The lines are known by `patterns`."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any, BinaryIO

from opsin.core.answer import Stage
from opsin.core.errors import BadInput
from opsin.doctor.explain import patterns as p
from opsin.doctor.explain.facts import Batch, Facts, Request, Setup

KEPT = 1000
"""Requests kept of a long log, besides the slowest."""
_MANY = 256  # images and batches kept of one request, and loads of a log
_LONGEST = 1 << 20  # characters of a piece: a longer line (a logged image) comes in several
_LONGEST_FACT = 2000  # characters of a line in which facts are looked for; only answers, in JSON, are longer
_HEAD = 120  # where a time stamp is looked for: prefixes of containers and journals stand before it
_BOMS = (b"\xff\xfe", b"\xfe\xff")
_STAGES = frozenset(stage.value for stage in Stage)


def parse(stream: BinaryIO) -> Facts:
    """Read a log to its end, in bounded memory. OSError when it cannot be read; BadInput when it tells nothing."""
    reader = _Reader()
    for number, text in _lines(stream):
        reader.feed(number, text)
    book, setup = reader.book, Setup(**reader.found)
    book.finish(*book.open)
    if not book.count and not setup.known:
        raise BadInput(
            "this log holds nothing that opsin explain knows: give it the whole output of llama-cpp-python "
            "(verbose=True), llama-server, llama-mtmd-cli, Ollama or Opsin, with its timings"
        )
    tool = p.TOOLS[reader.rank][0] if reader.rank < len(p.TOOLS) else "llama.cpp"
    return Facts(tool, setup, tuple(book.done), book.count, book.slowest)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """UTF-8, and UTF-16 with a mark; other bytes become replacement signs. Nothing but the line in hand is kept."""
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(io.BytesIO(stream.read()))
    encoding = "utf-16" if buffered.peek(2)[:2] in _BOMS else "utf-8"
    text = io.TextIOWrapper(buffered, encoding=encoding, errors="replace")
    number = 0
    while raw := text.readline(_LONGEST):
        number += raw.endswith("\n")
        if p.WORTH.search(raw):
            yield number, p.COLOURS.sub("", raw).rstrip()
    text.detach()


def _clock(text: str) -> float | None:
    """The time of a line in seconds of any origin, where it has one."""
    head = text[:_HEAD]
    if found := p.SERVER_CLOCK.search(head):
        return float(found[1]) * 60 + float(f"{found[2]}{found[3]}")
    if found := p.DATE.search(head):
        try:
            moment = datetime.fromisoformat(f"{found[1]}T{found[2]}+00:00")
        except ValueError:
            return None
        return moment.timestamp() + float(f"0.{found[3] or 0}")
    return None


def _tells(value: Any) -> bool:
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


class _Book:
    """Puts values together to requests: a value that a request has already, and otherwise, begins the next one."""

    def __init__(self) -> None:
        self.line = 0
        self.n_ctx: int | None = None  # the last one seen
        self.done: list[Request] = []
        self.count = 0
        self.slowest = Request()
        self.open: dict[str, dict[str, Any]] = {}
        self._task = ""

    def task(self, task: str) -> None:
        """The lines that follow are about this one."""
        self._task = task
        if len(self.open) > KEPT:
            self.finish(next(iter(self.open)))

    def put(self, **values: Any) -> None:
        """Add values that a request has once."""
        kept = {name: value for name, value in values.items() if _tells(value)}
        current = self._current()
        if any(name in current and current[name] != value for name, value in kept.items() if name != "timer"):
            self.finish(self._task)
        self._current().update(kept)

    def once(self, **values: Any) -> None:
        """Add values that belong to the request in hand whatever it has; the first ones stay."""
        for name, value in values.items():
            if _tells(value):
                self._current().setdefault(name, value)

    def closing(self, **values: Any) -> None:
        """Add the last values of the request in hand."""
        self.once(**values)
        self.finish(self._task)

    def event(self, **amounts: Any) -> None:
        """Add to counts, and to the end of tuples; what happens after the timers belongs to the next request."""
        if self.has("eval_ms") or self.has("total_ms"):
            self.finish(self._task)
        current = self._current()
        for name, amount in amounts.items():
            total = current.get(name, type(amount)()) + amount
            current[name] = total[:_MANY] if isinstance(total, tuple) else total

    def stage(self, name: str, ms: float) -> None:
        """Add a stage of Opsin's own account."""
        stages = self._current().get("stages", {})
        if stages.get(name, ms) != ms:
            self.finish(self._task)
            stages = {}
        if math.isfinite(ms):
            self._current()["stages"] = {**stages, name: ms}

    def has(self, name: str) -> bool:
        """The request in hand has this value already."""
        return name in self.open.get(self._task, {})

    def finish(self, *tasks: str) -> None:
        """These requests are over (none: the one in hand)."""
        for task in tasks or (self._task,):
            request = Request(**self.open.pop(task, {}))
            if request.tells:
                self.count += 1
                self.done += [request] if len(self.done) < KEPT else []
                self.slowest = request if request.whole >= self.slowest.whole else self.slowest

    def _current(self) -> dict[str, Any]:
        current = self.open.setdefault(self._task, {"line": self.line})
        if self.n_ctx is not None:
            current.setdefault("n_ctx", self.n_ctx)
        return current


class _Reader:
    """Feeds a book with the requests' lines, and keeps the fields of a Setup in `found`."""

    def __init__(self) -> None:
        self.book = _Book()
        self.found: dict[str, Any] = {}
        self.rank = len(p.TOOLS)
        self._loading_since: float | None = None
        self._encoding_since: float | None = None
        self._listing = False
        self._models: dict[str, int] = {}
        self._model = ""
        self._sizes: dict[tuple[str, str], int] = {}

    def feed(self, number: int, line: str) -> None:
        """One line that may hold a fact."""
        self.book.line = number
        self.rank = next((i for i, (_name, mark) in enumerate(p.TOOLS[: self.rank]) if mark.search(line)), self.rank)
        text = line[:_LONGEST_FACT]
        if found := p.TASK.search(text):
            self.book.task(found[1])
        if ("ctx" in text or "n_ctx" in text) and (found := p.CTX.search(text)):
            self.book.n_ctx = int(next(filter(None, found.groups())))
        if " time" in text and (found := p.TIMER.search(text)):
            self._timer(found, text[: found.start()])
        for how, part, pattern, told in p.LINES:
            if part in text and (found := pattern.search(text)):
                getattr(self if how == "setup" else self.book, how)(**p.values_of(found, told))
        self._unsupported(text)
        self._loads(text)
        if "mtmd" in text or "image" in text:
            self._image(text)
        # Before a timer, or of a load, "took 8 s" is no request's.
        if self.book.has("timer") and (found := p.WALL.search(text)) and "load" not in text.lower():
            self.book.once(wall_ms=float((found[1] or found[2]).replace(",", "")) * 1e3)
        if '"' in line or "'" in line:
            self._answer(line)
        if "total=" in text and (found := p.ACCESS.search(text)):
            self._access(found)

    def setup(self, **values: Any) -> None:
        """Fields of the setup: the last ones count, and those that count add up."""
        if "no_memory" in values:
            values["no_memory"] += self.found.get("no_memory", 0)
        self.found.update(values)

    def _timer(self, found: re.Match[str], head: str) -> None:
        name = p.TIMERS[found[1]]
        if self.book.has(f"{name}_ms"):
            self.book.finish()
        timer = "print_timings" if "llama_print" in head else "perf" if "perf" in head else "server"
        counts = {f"{name}_n": int(found[3])} if found[3] and name in {"prompt", "eval"} else {}
        self.book.put(timer=timer, **{f"{name}_ms": float(found[2])}, **counts)

    def _unsupported(self, text: str) -> None:
        if "unsupported ops" in text or "****" in text:
            self._listing = "unsupported ops" in text
        elif self._listing and (found := p.UNSUPPORTED.search(text)):
            known = self.found.get("unsupported", ())
            self.found["unsupported"] = tuple(dict.fromkeys((*known, found[1])))[:_MANY]

    def _loads(self, text: str) -> None:
        if found := p.LOADING.search(text):
            # One load is told by several voices, and a draft model is another model: the same words count.
            self._model = found.group()
            if self._model in self._models or len(self._models) < _MANY:
                self._models[self._model] = self._models.get(self._model, 0) + 1
            self._loading_since = _clock(text) if self._loading_since is None else self._loading_since
        elif self._models.get(self._model) and p.VOCABULARY.search(text):
            # Ollama looks at the vocabulary before it starts a runner, which loads the model.
            self._models[self._model] -= 1
            self._loading_since = None
        elif found := p.STARTED.search(text):
            self._loading_since = None
            self._loaded(float(found[1]))
        elif self._loading_since is not None and p.BEGUN.search(text):
            since, self._loading_since = self._loading_since, None
            if (now := _clock(text)) is not None and now >= since:
                self._loaded(now - since)
        if self._models:
            self.found["loads"] = max(self._models.values())

    def _loaded(self, seconds: float) -> None:
        self.found["load_s"] = (*self.found.get("load_s", ()), seconds)[:_MANY]

    def _image(self, text: str) -> None:
        if found := p.BATCH_SIZE.search(text):
            self._sizes[found[1], found[2]] = int(found[3])
            # llama-server tells no encoder time: it is what passes until the image's first batch begins.
            since, self._encoding_since = self._encoding_since, None
            if since is not None and (now := _clock(text)) is not None and now >= since:
                self.book.event(encode_ms=(round((now - since) * 1e3, 3),))
        elif found := p.BATCH.search(text):
            tokens = self._sizes.pop((found[1], found[2]), None)
            self.book.event(batches=(Batch(int(found[2]), tokens, float(found[3])),))
        elif "encoding mtmd batch" in text:
            self._encoding_since = _clock(text)
        elif "encoded in" in text or "encoding done" in text:
            self._encoding_since = None

    def _answer(self, line: str) -> None:
        """OpenAI's `usage`, llama-server's `timings`, Ollama's durations, and Opsin's stages."""
        book, pairs = self.book, p.PAIR.findall(line)
        if book.has("finish") and any(word and name in p.ENDS for name, _number, word in pairs):
            book.finish()
        for name, number, word in pairs:
            if word and name in {*p.ENDS, "limit"}:
                book.once(finish=word if name in p.ENDS else f"limit:{word}")
            elif number and name in p.TIMES:
                field, factor, timer = p.TIMES[name]
                book.put(timer=timer, **{field: float(number) * factor})
            elif number and name in p.COUNTS:
                book.put(**{p.COUNTS[name]: int(float(number))})
            elif number and (name == "total_ms" or (name.endswith("_ms") and name[:-3] in _STAGES)):
                book.stage(name[:-3], float(number))
                book.once(wall_ms=float(number) if name == "total_ms" else None)

    def _access(self, found: re.Match[str]) -> None:
        """A line of Opsin's access log."""
        book, whole = self.book, float(found[3]) * 1e3
        book.put(timer="opsin", prompt_tokens=int(found[1]), completion_tokens=int(found[2]), wall_ms=whole)
        book.stage("total", whole)
        for name, value, end in p.ACCESS_FIELD.findall(found[4]):
            if name in _STAGES:
                book.stage(name, float(value) * 1e3)
            elif end:
                book.once(finish=end if end in {"stop", "length"} else f"limit:{end}")
