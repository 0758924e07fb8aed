"""A log in, facts out: which tool wrote it, what it ran on, and its requests. The lines are known by `patterns`."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, BinaryIO

from opsin.core.errors import BadInput
from opsin.core.stages import Stage
from opsin.doctor.explain import patterns as p
from opsin.doctor.explain.book import Book
from opsin.doctor.explain.facts import Batch, Facts, Request, Setup
from opsin.doctor.explain.lines import LONGEST_FACT, Line, clean_lines

_STAGES = frozenset(stage.value for stage in Stage)
_MANY = 64


def parse(stream: BinaryIO) -> Facts:
    """Read a log to its end, in bounded memory. OSError when it cannot be read; BadInput when it tells nothing."""
    book, setup = Book(), _SetupReader()
    timings = _Timings(book)
    rank = len(p.TOOLS)
    for line in clean_lines(stream):
        rank = next((i for i, (_name, mark) in enumerate(p.TOOLS[:rank]) if mark.search(line.text)), rank)
        setup.feed(line)
        timings.feed(line)
        _answer(line, book)
    book.end()
    if not book.count and not setup.found.known:
        raise BadInput(
            "this log holds nothing that opsin explain knows: give it the whole output of llama-cpp-python "
            "(verbose=True), llama-server, llama-mtmd-cli, Ollama or Opsin, with its timings"
        )
    tool = p.TOOLS[rank][0] if rank < len(p.TOOLS) else "llama.cpp"
    return Facts(tool, setup.found, tuple(book.done), book.count, book.slowest or Request())


class _SetupReader:
    """Keeps the facts of the lines seen so far in `found`."""

    def __init__(self) -> None:
        self.found = Setup()
        self._loading_since: float | None = None
        self._listing = False
        self._models: dict[str, int] = {}
        self._model = ""

    def feed(self, line: Line) -> None:
        text = line.text[:LONGEST_FACT]
        if p.ANY_SETUP.search(text):
            for name, pattern in p.SETUP.items():
                if found := pattern.search(text):
                    self._set(**self._fact(name, found))
        if "unsupported ops" in text or "****" in text:
            self._listing = "unsupported ops" in text
        elif self._listing and (found := p.UNSUPPORTED.search(text)):
            self._set(unsupported=tuple(dict.fromkeys((*self.found.unsupported, found.group(1))))[:_MANY])
        self._loads(line, text)

    def _set(self, **values: Any) -> None:
        self.found = replace(self.found, **values)

    def _fact(self, name: str, found: re.Match[str]) -> dict[str, Any]:
        groups = found.groups()
        if name == "no_memory":
            return {name: self.found.no_memory + 1}
        if name.startswith("flash"):
            return {"flash": name == "flash_on", "flash_failed": self.found.flash_failed or name == "flash_failed"}
        if name == "elapsed_s":
            return {name: int(groups[0] or 0) * 3600 + int(groups[1]) * 60 + float(groups[2])}
        if name in {"faults", "cpu_share"}:
            return {name: int(groups[0]) / 100 if name == "cpu_share" else int(groups[0])}
        if name == "ollama_layers":
            return {"layers": (int(groups[1]), int(groups[0]))}
        return {name: (int(groups[0]), int(groups[1])) if len(groups) > 1 else groups[0] if groups else True}

    def _loads(self, line: Line, text: str) -> None:
        if found := p.LOADING.search(text):
            # One load is told by several voices, and a draft model is another model: the same words count.
            self._model = found.group()
            if self._model in self._models or len(self._models) < _MANY:
                self._models[self._model] = self._models.get(self._model, 0) + 1
            self._set(loads=max(self._models.values()))
            self._loading_since = line.clock if self._loading_since is None else self._loading_since
        elif self._models.get(self._model) and p.VOCABULARY.search(text):
            # Ollama looks at the vocabulary before it starts a runner, which loads the model.
            self._models[self._model] -= 1
            self._set(loads=max(self._models.values()))
            self._loading_since = None
        elif found := p.STARTED.search(text):
            self._loading_since = None
            self._loaded(float(found.group(1)))
        elif self._loading_since is not None and p.BEGUN.search(text):
            since, self._loading_since = self._loading_since, None
            if line.clock is not None and line.clock >= since:
                self._loaded(line.clock - since)

    def _loaded(self, seconds: float) -> None:
        if len(self.found.load_s) < _MANY:
            self._set(load_s=(*self.found.load_s, seconds))


class _Timings:
    """Feeds a book with timers, images and slots from the lines of llama.cpp and its front ends."""

    def __init__(self, book: Book) -> None:
        self._n_ctx: int | None = None  # the last one seen
        self._book = book
        self._sizes: dict[tuple[int, int], int] = {}
        self._encoding_since: float | None = None

    def feed(self, line: Line) -> None:
        text = line.text[:LONGEST_FACT]
        if found := p.TASK.search(text):
            self._book.task(found.group(1))
        if " time" in text and (found := p.TIMER.search(text)):
            self._timer(line, found)
        elif "slot" in text or "n_ctx" in text or "ctx-size" in text:
            self._slot(line)
        if "image" in text or "mtmd" in text:
            self._image(line)
        # Before a timer, or of a load, "took 8 s" is no request's.
        if self._book.has("timer") and (found := p.WALL.search(text)) and "load" not in text.lower():
            self._book.once(line.number, wall_ms=float((found.group(1) or found.group(3)).replace(",", "")) * 1e3)

    def _timer(self, line: Line, found: re.Match[str]) -> None:
        kind, ms, count = found.groups()
        name, counted = p.TIMERS[kind]
        head = line.text[: found.start()]
        timer = "print_timings" if "llama_print" in head else "perf" if "perf" in head else "server"
        values: dict[str, float | int | str] = {name: float(ms), "timer": timer}
        if count and counted:
            values[counted] = int(count)
        if self._book.has(name):
            self._book.finish()
        self._book.put(line.number, n_ctx=self._n_ctx, **values)

    def _slot(self, line: Line) -> None:
        text, book = line.text, self._book
        if found := p.CTX.search(text):
            self._n_ctx = int(next(filter(None, found.groups())))
        if found := p.PROMPT.search(text):
            book.once(line.number, prompt_tokens=int(found.group(1)), n_ctx=self._n_ctx)
        if found := p.STOPPED.search(text):
            end, cut = map(int, found.groups())
            book.once(line.number, end_tokens=end, truncated=bool(cut) or None, n_ctx=self._n_ctx)
        if "context shift," in text:
            book.add(line.number, "shifts", 1)
        if p.KV_FULL.search(text):
            book.add(line.number, "kv_full", 1)
        elif "retrying with smaller" in text and book.has("kv_full"):
            book.add(line.number, "kv_full", -1)
        if text.endswith("memory slot for batch of size 1"):
            # Not a prompt that found no cells, but an answer that ran out of them, token by token.
            book.once(line.number, truncated=True, n_ctx=self._n_ctx)
        if "forcing full prompt re-processing" in text:
            book.once(line.number, reprocessed=True)

    def _image(self, line: Line) -> None:
        text, book = line.text, self._book
        if found := p.ENCODED.search(text):
            book.image(line.number, encode_ms=float(found.group(1)))
            self._encoding_since = None
        elif found := p.BATCH_SIZE.search(text):
            index, count, tokens = map(int, found.groups())
            self._sizes[index, count] = tokens
            self._by_clock(line)
        elif found := p.BATCH.search(text):
            index, count = int(found.group(1)), int(found.group(2))
            tokens_seen = self._sizes.pop((index, count), None)
            book.image(line.number, batch=Batch(index, count, tokens_seen, float(found.group(3))))
        elif found := p.PROCESSED.search(text):
            book.put(line.number, processed_ms=float(found.group(1)))
        elif found := p.EMBEDDING.search(text):
            book.add(line.number, "image_tokens", int(next(filter(None, found.groups()))))
        elif "encoding mtmd batch" in text:
            self._encoding_since = line.clock

    def _by_clock(self, line: Line) -> None:
        """llama-server tells no encoder time: it is what passes until the image's first batch begins."""
        since, self._encoding_since = self._encoding_since, None
        if since is not None and line.clock is not None and line.clock >= since:
            self._book.image(line.number, encode_ms=round((line.clock - since) * 1e3, 3))


def _answer(line: Line, book: Book) -> None:
    """OpenAI's `usage`, llama-server's `timings`, Ollama's durations, and Opsin's stages and access log."""
    text = line.text
    if '"' in text or "'" in text:
        pairs = p.PAIR.findall(text)
        if book.has("finish") and any(word and name in p.ENDS for name, _number, word in pairs):
            book.finish()
        for name, number, word in pairs:
            _pair(line.number, book, name, number, word)
    text = text[:LONGEST_FACT]
    if found := p.VERBOSE.search(text):
        _verbose(line.number, book, found.group(1).replace(" ", "_"), found.group(2))
    elif found := p.GIN.search(text):
        book.once(line.number, wall_ms=go_duration(found.group(1)), timer="ollama")
        book.finish()
    elif "total=" in text and (found := p.ACCESS.search(text)):
        _access(line.number, book, found)


def go_duration(text: str) -> float | None:
    """Milliseconds of a duration as Go prints it ("1m2.5s", "78.93µs"); None if it is none."""
    parts = p.GO.findall(text)
    return sum(float(number) * p.GO_MS[unit] for number, unit in parts) if parts else None


def _pair(line: int, book: Book, name: str, number: str, word: str) -> None:
    if word and (name in p.ENDS or name == "limit"):
        book.once(line, finish=word if name in p.ENDS else f"limit:{word}")
    elif not number:
        return
    elif name in p.FIELDS["ollama"]:
        field, factor = p.FIELDS["ollama"][name]
        book.put(line, timer="ollama", **{field: float(number) * factor})
    elif name in p.FIELDS["server"]:
        book.once(line, timer="server")
        book.put(line, **{p.FIELDS["server"][name][0]: float(number)})
    elif name in p.COUNTS:
        book.put(line, **{p.COUNTS[name]: int(float(number))})
    elif name == "total_ms" or (name.endswith("_ms") and name[:-3] in _STAGES):
        book.stage(line, name[:-3], float(number))
        if name == "total_ms":
            book.once(line, wall_ms=float(number))


def _verbose(line: int, book: Book, key: str, value: str) -> None:
    if key in p.FIELDS["ollama"]:
        book.put(line, timer="ollama", **{p.FIELDS["ollama"][key][0]: go_duration(value)})
    elif value.isdigit() and key in p.COUNTS:
        book.put(line, **{p.COUNTS[key]: int(value)})


def _access(line: int, book: Book, found: re.Match[str]) -> None:
    prompt, answer, total, rest = found.groups()
    whole = float(total) * 1e3
    book.put(line, timer="opsin", prompt_tokens=int(prompt), completion_tokens=int(answer), wall_ms=whole)
    book.stage(line, "total", whole)
    for name, value, end in p.ACCESS_FIELD.findall(rest):
        if name in _STAGES:
            book.stage(line, name, float(value) * 1e3)
        elif end:
            book.once(line, finish=f"limit:{end}" if end not in {"stop", "length"} else end)
