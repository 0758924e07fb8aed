"""Reads timers, pictures and slots from the lines of llama.cpp and its front ends into the book of requests.

The strings are those of llama.cpp (`llama_print_timings`, `llama_perf_context_print`, the server's `print_timings`,
`mtmd-helper.cpp`, the old `clip.cpp` and `llava.cpp`), of llama-cpp-python's handlers and of scripts around them.
"""

from __future__ import annotations

import re

from opsin.doctor.explain.lines import LONGEST_FACT, Line
from opsin.doctor.explain.request import Batch, Book

_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,20})?)"
_COUNT = r"(\d{1,9})"
_TIMER = re.compile(rf"(load|sampl(?:e|ing)|prompt eval|eval|total) time\s*=\s*{_NUMBER} ms(?:\s*/\s*{_COUNT})?")
_TASK = re.compile(rf"\| task {_COUNT} \|")
_ENCODED = re.compile(rf"(?:image slice|image|mtmd batch) (?:encoded|encoding done) in\s+{_NUMBER} ms")
_BATCH_SIZE = re.compile(rf"decoding image batch {_COUNT}/{_COUNT}, n_tokens_batch = {_COUNT}")
_BATCH = re.compile(rf"image decoded \(batch {_COUNT}/{_COUNT}\) in {_NUMBER} ms")
_EMBEDDING = re.compile(rf"image embedding created: {_COUNT} tokens|image_tokens->nx = {_COUNT}")
_PROCESSED = re.compile(rf"image processed in {_NUMBER} ms")
_STOPPED = re.compile(rf"stop processing: n_(?:tokens|past) = {_COUNT}, truncated = ([01])")
_CTX = re.compile(rf"n_ctx_slot\s*=\s*{_COUNT}|n_ctx\s+= {_COUNT}|--ctx-size {_COUNT}|\bn_ctx={_COUNT}")
_KV_FULL = re.compile(r"failed to find (?:a memory|KV cache) slot for u?batch of size (?!1\b)|could not find a KV slot")
_PROMPT = re.compile(rf"(?:n_prompt_tokens|task\.n_tokens) = {_COUNT}")
_WALL = re.compile(
    rf"(?:\b(?:cost|took|elapsed)|time is)\s{{0,9}}[:=]?\s{{0,9}}(\d{{1,3}}(?:,\d{{3}})+(?:\.\d{{1,9}})?|{_NUMBER})"
    rf"\s?(?:s|sec|seconds)(?![\w/])|time is:{_NUMBER}$"
)
_NAMES = {"load": "load_ms", "prompt eval": "prompt_ms", "eval": "eval_ms", "total": "total_ms"}
_COUNTS = {"prompt_ms": "prompt_n", "eval_ms": "eval_n", "sample_ms": "sample_n"}


class Timings:
    """Feeds a book with what llama.cpp's lines say. `n_ctx` is the last context size seen."""

    def __init__(self, book: Book) -> None:
        self.n_ctx: int | None = None
        self._book = book
        self._sizes: dict[tuple[int, int], int] = {}
        self._encoding_since: float | None = None

    def feed(self, line: Line) -> None:
        """Read a line."""
        text = line.text[:LONGEST_FACT]
        if found := _TASK.search(text):
            self._book.task(found.group(1))
        if " time" in text and (found := _TIMER.search(text)):
            self._timer(line, found)
        elif "slot" in text or "n_ctx" in text or "ctx-size" in text:
            self._slot(line)
        if "image" in text or "mtmd" in text:
            self._picture(line)
        # Before a timer, or of a load, "took 8 s" is no request's.
        if self._book.has("timer") and (found := _WALL.search(text)) and "load" not in text.lower():
            self._book.once(line.number, wall_ms=float((found.group(1) or found.group(3)).replace(",", "")) * 1e3)

    def _timer(self, line: Line, found: re.Match[str]) -> None:
        kind, ms, count = found.groups()
        name = _NAMES.get(kind, "sample_ms")
        head = line.text[: found.start()]
        timer = "print_timings" if "llama_print" in head else "perf" if "perf" in head else "server"
        values: dict[str, float | int | str] = {name: float(ms), "timer": timer}
        if count and name in _COUNTS:
            values[_COUNTS[name]] = int(count)
        if self._book.has(name):
            self._book.finish()
        self._book.put(line.number, n_ctx=self.n_ctx, **values)

    def _slot(self, line: Line) -> None:
        text, book = line.text, self._book
        if found := _CTX.search(text):
            self.n_ctx = int(next(filter(None, found.groups())))
        if found := _PROMPT.search(text):
            book.once(line.number, prompt_tokens=int(found.group(1)), n_ctx=self.n_ctx)
        if found := _STOPPED.search(text):
            end, cut = map(int, found.groups())
            book.once(line.number, end_tokens=end, truncated=bool(cut) or None, n_ctx=self.n_ctx)
        if "context shift," in text:
            book.add(line.number, "shifts", 1)
        if _KV_FULL.search(text):
            book.add(line.number, "kv_full", 1)
        elif "retrying with smaller" in text and book.has("kv_full"):
            book.add(line.number, "kv_full", -1)
        if text.endswith("memory slot for batch of size 1"):
            # Not a prompt that found no cells, but an answer that ran out of them, token by token.
            book.once(line.number, truncated=True, n_ctx=self.n_ctx)
        if "forcing full prompt re-processing" in text:
            book.once(line.number, reprocessed=True)

    def _picture(self, line: Line) -> None:
        text, book = line.text, self._book
        if found := _ENCODED.search(text):
            book.picture(line.number, encode_ms=float(found.group(1)))
            self._encoding_since = None
        elif found := _BATCH_SIZE.search(text):
            index, count, tokens = map(int, found.groups())
            self._sizes[index, count] = tokens
            self._by_clock(line)
        elif found := _BATCH.search(text):
            index, count = int(found.group(1)), int(found.group(2))
            tokens_seen = self._sizes.pop((index, count), None)
            book.picture(line.number, batch=Batch(index, count, tokens_seen, float(found.group(3))))
        elif found := _PROCESSED.search(text):
            book.put(line.number, processed_ms=float(found.group(1)))
        elif found := _EMBEDDING.search(text):
            book.add(line.number, "image_tokens", int(next(filter(None, found.groups()))))
        elif "encoding mtmd batch" in text:
            self._encoding_since = line.clock

    def _by_clock(self, line: Line) -> None:
        """llama-server tells no encoder time: it is what passes until the picture's first batch begins."""
        since, self._encoding_since = self._encoding_since, None
        if since is not None and line.clock is not None and line.clock >= since:
            self._book.picture(line.number, encode_ms=round((line.clock - since) * 1e3, 3))
