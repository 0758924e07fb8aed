"""A log in, facts out: which tool wrote it, what it ran on, and its requests. The lines are known by `patterns`."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
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
    book = _Book()
    setup, timings = _SetupReader(), _Timings(book)
    rank = len(p.TOOLS)
    for line in _lines(stream):
        book.line = line.number
        rank = next((i for i, (_name, mark) in enumerate(p.TOOLS[:rank]) if mark.search(line.text)), rank)
        setup.feed(line)
        timings.feed(line)
        _answer(line.text, book)
    book.finish(*book.open)
    found = Setup(**setup.found)
    if not book.count and not found.known:
        raise BadInput(
            "this log holds nothing that opsin explain knows: give it the whole output of llama-cpp-python "
            "(verbose=True), llama-server, llama-mtmd-cli, Ollama or Opsin, with its timings"
        )
    tool = p.TOOLS[rank][0] if rank < len(p.TOOLS) else "llama.cpp"
    return Facts(tool, found, tuple(book.done), book.count, book.slowest)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line that may hold a fact; `clock` is its time in seconds of any origin, where it has one."""

    number: int
    text: str
    clock: float | None


def _lines(stream: BinaryIO) -> Iterator[_Line]:
    """UTF-8, and UTF-16 with a mark; other bytes become replacement signs. Nothing but the line in hand is kept."""
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(io.BytesIO(stream.read()))
    encoding = "utf-16" if buffered.peek(2)[:2] in _BOMS else "utf-8"
    text = io.TextIOWrapper(buffered, encoding=encoding, errors="replace")
    number = 0
    while raw := text.readline(_LONGEST):
        number += raw.endswith("\n")
        if p.WORTH.search(raw):
            line = p.COLOURS.sub("", raw).rstrip()
            yield _Line(number, line, _clock(line[:_HEAD]))
    text.detach()


def _clock(head: str) -> float | None:
    if found := p.SERVER_CLOCK.search(head):
        return float(found[1]) * 60 + float(found[2]) + float(f"0.{found[3]}{found[4]}")
    if found := p.DATE.search(head):
        try:
            day = datetime.fromisoformat(f"{found[1]}T{found[2]}")
        except ValueError:
            return None
        midnight = day.toordinal() * 86400.0
        return midnight + day.hour * 3600 + day.minute * 60 + day.second + float(f"0.{found[3] or 0}")
    return None


class _Book:
    """Puts values together to requests: a value that a request has already, and otherwise, begins the next one."""

    def __init__(self) -> None:
        self.line = 0
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

    def event(self, **amounts: Any) -> None:
        """Add to counts, and to the end of tuples; what happens after the timers belongs to the next request."""
        if self.has("eval_ms") or self.has("total_ms"):
            self.finish(self._task)
        current = self._current()
        for name, amount in amounts.items():
            current[name] = current.get(name, type(amount)()) + amount
            current[name] = current[name][:_MANY] if isinstance(amount, tuple) else current[name]

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
        return self.open.setdefault(self._task, {"line": self.line})


def _tells(value: Any) -> bool:
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


class _SetupReader:
    """Keeps the fields of a Setup in `found`."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._loading_since: float | None = None
        self._listing = False
        self._models: dict[str, int] = {}
        self._model = ""

    def feed(self, line: _Line) -> None:
        text = line.text[:_LONGEST_FACT]
        if p.ANY_SETUP.search(text):
            for name, pattern, value in p.SETUP:
                if found := pattern.search(text):
                    told = value(found.groups()) if callable(value) else value
                    self.found[name] = self.found.get(name, 0) + told if name == "no_memory" else told
        if "unsupported ops" in text or "****" in text:
            self._listing = "unsupported ops" in text
        elif self._listing and (found := p.UNSUPPORTED.search(text)):
            known = self.found.get("unsupported", ())
            self.found["unsupported"] = tuple(dict.fromkeys((*known, found[1])))[:_MANY]
        self._loads(line, text)

    def _loads(self, line: _Line, text: str) -> None:
        if found := p.LOADING.search(text):
            # One load is told by several voices, and a draft model is another model: the same words count.
            self._model = found.group()
            if self._model in self._models or len(self._models) < _MANY:
                self._models[self._model] = self._models.get(self._model, 0) + 1
            self._loading_since = line.clock if self._loading_since is None else self._loading_since
        elif self._models.get(self._model) and p.VOCABULARY.search(text):
            # Ollama looks at the vocabulary before it starts a runner, which loads the model.
            self._models[self._model] -= 1
            self._loading_since = None
        elif found := p.STARTED.search(text):
            self._loading_since = None
            self._loaded(float(found[1]))
        elif self._loading_since is not None and p.BEGUN.search(text):
            since, self._loading_since = self._loading_since, None
            if line.clock is not None and line.clock >= since:
                self._loaded(line.clock - since)
        if self._models:
            self.found["loads"] = max(self._models.values())

    def _loaded(self, seconds: float) -> None:
        self.found["load_s"] = (*self.found.get("load_s", ()), seconds)[:_MANY]


class _Timings:
    """Feeds a book with timers, images and slots from the lines of llama.cpp and its front ends."""

    def __init__(self, book: _Book) -> None:
        self._book = book
        self._n_ctx: int | None = None  # the last one seen
        self._sizes: dict[tuple[int, int], int] = {}
        self._encoding_since: float | None = None

    def feed(self, line: _Line) -> None:
        text, book = line.text[:_LONGEST_FACT], self._book
        if found := p.TASK.search(text):
            book.task(found[1])
        if " time" in text and (found := p.TIMER.search(text)):
            name, counted = p.TIMERS[found[1]]
            if book.has(name):
                book.finish()
            head = text[: found.start()]
            timer = "print_timings" if "llama_print" in head else "perf" if "perf" in head else "server"
            counts = {counted: int(found[3])} if found[3] and counted else {}
            book.put(n_ctx=self._n_ctx, timer=timer, **{name: float(found[2])}, **counts)
        elif "slot" in text or "n_ctx" in text or "ctx-size" in text:
            self._slot(text)
        if "image" in text or "mtmd" in text:
            self._image(text, line.clock)
        # Before a timer, or of a load, "took 8 s" is no request's.
        if book.has("timer") and (found := p.WALL.search(text)) and "load" not in text.lower():
            book.once(wall_ms=float((found[1] or found[3]).replace(",", "")) * 1e3)

    def _slot(self, text: str) -> None:
        book = self._book
        if found := p.CTX.search(text):
            self._n_ctx = int(next(filter(None, found.groups())))
        if found := p.PROMPT.search(text):
            book.once(prompt_tokens=int(found[1]), n_ctx=self._n_ctx)
        if found := p.STOPPED.search(text):
            book.once(end_tokens=int(found[1]), truncated=found[2] == "1" or None, n_ctx=self._n_ctx)
        if "context shift," in text:
            book.event(shifts=1)
        if p.KV_FULL.search(text):
            book.event(kv_full=1)
        elif "retrying with smaller" in text and book.has("kv_full"):
            book.event(kv_full=-1)
        if text.endswith("memory slot for batch of size 1"):
            # Not a prompt that found no cells, but an answer that ran out of them, token by token.
            book.once(truncated=True, n_ctx=self._n_ctx)
        if "forcing full prompt re-processing" in text:
            book.once(reprocessed=True)

    def _image(self, text: str, clock: float | None) -> None:
        book = self._book
        if found := p.ENCODED.search(text):
            book.event(encode_ms=(float(found[1]),))
            self._encoding_since = None
        elif found := p.BATCH_SIZE.search(text):
            index, count, tokens = map(int, found.groups())
            self._sizes[index, count] = tokens
            # llama-server tells no encoder time: it is what passes until the image's first batch begins.
            since, self._encoding_since = self._encoding_since, None
            if since is not None and clock is not None and clock >= since:
                book.event(encode_ms=(round((clock - since) * 1e3, 3),))
        elif found := p.BATCH.search(text):
            index, count = int(found[1]), int(found[2])
            book.event(batches=(Batch(index, count, self._sizes.pop((index, count), None), float(found[3])),))
        elif found := p.PROCESSED.search(text):
            book.put(processed_ms=float(found[1]))
        elif found := p.EMBEDDING.search(text):
            book.event(image_tokens=int(found[1] or found[2]))
        elif "encoding mtmd batch" in text:
            self._encoding_since = clock


def _answer(text: str, book: _Book) -> None:
    """OpenAI's `usage`, llama-server's `timings`, Ollama's durations, and Opsin's stages and access log."""
    if '"' in text or "'" in text:
        pairs = p.PAIR.findall(text)
        if book.has("finish") and any(word and name in p.ENDS for name, _number, word in pairs):
            book.finish()
        for name, number, word in pairs:
            _pair(book, name, number, word)
    _plain_answer(text[:_LONGEST_FACT], book)


def _plain_answer(text: str, book: _Book) -> None:
    if found := p.VERBOSE.search(text):
        name, value = found[1].replace(" ", "_"), found[2]
        if name.endswith("duration"):
            book.put(timer="ollama", **{p.TIMES[name][0]: go_duration(value)})
        elif value.isdigit():
            book.put(**{p.COUNTS[name]: int(value)})
    elif found := p.GIN.search(text):
        book.once(wall_ms=go_duration(found[1]), timer="ollama")
        book.finish()
    elif "total=" in text and (found := p.ACCESS.search(text)):
        whole = float(found[3]) * 1e3
        book.put(timer="opsin", prompt_tokens=int(found[1]), completion_tokens=int(found[2]), wall_ms=whole)
        book.stage("total", whole)
        for name, value, end in p.ACCESS_FIELD.findall(found[4]):
            if name in _STAGES:
                book.stage(name, float(value) * 1e3)
            elif end:
                book.once(finish=f"limit:{end}" if end not in {"stop", "length"} else end)


def _pair(book: _Book, name: str, number: str, word: str) -> None:
    if word and name in {*p.ENDS, "limit"}:
        book.once(finish=word if name in p.ENDS else f"limit:{word}")
    elif number and name in p.TIMES:
        field, factor, timer = p.TIMES[name]
        book.put(timer=timer, **{field: float(number) * factor})
    elif number and name in p.COUNTS:
        book.put(**{p.COUNTS[name]: int(float(number))})
    elif number and (name == "total_ms" or (name.endswith("_ms") and name[:-3] in _STAGES)):
        book.stage(name[:-3], float(number))
        if name == "total_ms":
            book.once(wall_ms=float(number))


def go_duration(text: str) -> float | None:
    """Milliseconds of a duration as Go prints it ("1m2.5s", "78.93µs"); None if it is none."""
    parts = p.GO.findall(text)
    return sum(float(number) * p.GO_MS[unit] for number, unit in parts) if parts else None
