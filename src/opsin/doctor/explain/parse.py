"""A log in, facts out: which tool wrote it, what it ran on, and its requests. `lines.toml` knows most of the lines."""

import io
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import reduce
from typing import Any, BinaryIO

from opsin.core.answer import Stage
from opsin.core.errors import BadInput
from opsin.core.files import read_table
from opsin.doctor.explain.facts import Batch, Facts, Request, Setup

KEPT = 1000
"""Requests kept of a long log, besides the slowest."""
_MANY = 256  # images and batches kept of one request, and loads of a log
_LONGEST = 1 << 20  # characters of a piece: a longer line (a logged image) comes in several
_LONGEST_FACT = 2000  # characters of a line in which facts are looked for; only answers, in JSON, are longer
_STAGES = frozenset({"total", *(stage.value for stage in Stage)})
_COUNT, _NUMBER = "[0-9]{1,9}", r"[0-9]{1,15}(?:\.[0-9]{1,20})?"
_GO_MS = {"h": 3.6e6, "m": 6e4, "s": 1e3, "ms": 1.0, "µs": 1e-3, "μs": 1e-3, "us": 1e-3, "ns": 1e-6}


def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of the table: `{name}` stands for a number, which is a whole one unless the name ends in _s or _ms."""
    pattern = re.sub(r"\{([a-z_]*_m?s)\}", rf"(?P<\1>{_NUMBER})", pattern)
    return re.compile(re.sub(r"\{([a-z_]+)\}", rf"(?P<\1>{_COUNT})", pattern))


_TABLE = read_table(__file__, "lines.toml")
_TOOLS = [(name, re.compile(pattern)) for name, pattern in _TABLE["tools"].items()]
_LINES = [(how, _compiled(row["like"]), row.get("says", {})) for how, rows in _TABLE["lines"].items() for row in rows]
_PATTERNS = {name: _compiled(pattern) for name, pattern in _TABLE["patterns"].items()}
_TIMERS, _TIMES, _COUNTS, _ENDS = _TABLE["timers"], _TABLE["times"], _TABLE["counts"], frozenset(_TABLE["ends"])


def parse(stream: BinaryIO) -> Facts:
    """Read a log to its end, in bounded memory. OSError when it cannot be read; BadInput when it tells nothing."""
    reader = _Reader()
    for number, text in _lines(stream):
        reader.feed(number, text)
    book, setup = reader.book, Setup(**reader.found)
    book.finish(*book.open)
    if not book.count and not setup.known and not (book.refused and reader.rank < len(_TOOLS)):
        raise BadInput(
            "this log holds nothing that opsin explain knows: give it the whole output of llama-cpp-python "
            "(verbose=True), llama-server, llama-mtmd-cli, Ollama, LM Studio or Opsin, with its timings"
        )
    tool = _TOOLS[reader.rank][0] if reader.rank < len(_TOOLS) else "llama.cpp"
    # Ollama's client and another tool may stand in one file: the request that is explained tells whose it is.
    tool = "Ollama" if book.slowest.timer == "ollama" else tool
    return Facts(tool, setup, tuple(book.done), book.count, book.slowest, book.refused, book.refusal)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """UTF-8, and UTF-16 with a mark; other bytes become replacement signs. Nothing but the line in hand is kept."""
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(io.BytesIO(stream.read()))
    encoding = "utf-16" if buffered.peek(2)[:2] in {BOM_UTF16_LE, BOM_UTF16_BE} else "utf-8"
    text = io.TextIOWrapper(buffered, encoding=encoding, errors="replace")
    number = 0
    while raw := text.readline(_LONGEST):
        number += raw.endswith("\n")
        yield number, _PATTERNS["colours"].sub("", raw).rstrip()
    text.detach()


def _clock(text: str) -> float | None:
    """The time of a line in seconds of any origin, where it has one."""
    if found := _PATTERNS["server_clock"].search(text):
        return float(found[1]) * 60 + float(f"{found[2]}{found[3]}")
    if found := _PATTERNS["date"].search(text):
        with suppress(ValueError):
            return datetime.fromisoformat(f"{found[0]}+00:00").timestamp()
    return None


class _Book:
    """Puts values together to requests: a value that a request has already, and otherwise, begins the next one.

    Times of Opsin's own account are values named "stage encode".
    """

    def __init__(self) -> None:
        self.line = 0
        self.text = self.stamp = ""  # the line in hand, and the last one that may begin with a date
        self.same = False  # the line in hand goes on with an answer: its values replace those before
        self.refused: dict[int, int] = {}
        self.refusal = ""
        self.load_ms: float | None = None  # the next request that the HTTP server tells waited for this
        self._n_ctx: int | None = None
        self.done: list[Request] = []
        self.count = 0
        self.slowest = Request()
        self.open: dict[int, dict[str, Any]] = {}
        self._task = 0

    def task(self, number: int) -> None:
        """The lines that follow are about this one."""
        self._task = number
        if len(self.open) > KEPT:
            self.finish(next(iter(self.open)))

    def context(self, size: int) -> None:
        """Requests from here on have so many tokens of context."""
        self._n_ctx = size

    def put(self, **values: Any) -> None:
        """Add values that a request has once."""
        kept = {name: value for name, value in values.items() if value is not None}
        current = self._current()
        again = any(name in current and current[name] != value for name, value in kept.items() if name != "timer")
        # Two tools in one file: a request has either Ollama's times or those of llama.cpp.
        again |= {"timer"} <= kept.keys() & current.keys() and "ollama" in {kept["timer"]} ^ {current["timer"]}
        if again and not self.same:
            self.finish(self._task)
        self._current().update(kept)

    def once(self, **values: Any) -> None:
        """Add values that belong to the request in hand whatever it has; the first ones stay."""
        for name, value in values.items():
            if value is not None:
                self._current().setdefault(name, value)

    def event(self, **amounts: Any) -> None:
        """Add to counts, and to the end of tuples; what happens after the timers belongs to the next request."""
        if self.has("eval_ms") or self.has("total_ms"):
            self.finish(self._task)
        current = self._current()
        for name, amount in amounts.items():
            total = current.get(name, type(amount)()) + amount
            current[name] = total[:_MANY] if isinstance(total, tuple) else total

    def shift(self, limit: int | None = None, discarded: int = 0) -> None:
        """The context was full, and its older part was thrown away. Two shifts and their clocks tell the speed."""
        self.event(shifts=1)
        now = _clock(self.text) or 0.0
        self.once(n_ctx=limit, shifted_from=now)
        self._current().update(shifted_to=now, shifted_by=discarded)

    def progress(self, **values: float) -> None:
        """How far a request is that may be unfinished when the log ends."""
        values["progress_s"] = values.pop("progress_percent", 100 * values.get("progress_s", 1)) / 100
        before = self.open.get(self._task, {}).get("at", {})
        if self.has("eval_ms") or values["progress_s"] < before.get("progress_s", 0.0):
            self.finish(self._task)
        if "decoded" not in values:
            values["prompt_to"] = _clock(self.text) or _clock(self.stamp) or 0.0
            self.once(begun=(values["prompt_to"], values.get("prompt_at", 0)))
        self._current().setdefault("at", {}).update(values)

    def http(self, status: int = 200, wall_ms: float | None = None, why: str = "") -> None:
        """A line of an HTTP server: what it refused, or how long a request took in all."""
        self.refusal = self.refusal or why
        if status >= 400 and not why:
            self.refused[status] = self.refused.get(status, 0) + 1
        if wall_ms is None or 400 <= status < 500:
            return
        told = self.open.get(self._task, {})
        total, ollama = told.get("total_ms") or 0.0, told.get("timer") == "ollama"
        # What Ollama's client tells beside it is the same request if it took as long.
        if "wall_ms" in told or total > 1.02 * wall_ms + 1 or (ollama and 0 < total < 0.8 * wall_ms):
            self.finish(self._task)
        load, self.load_ms = self.load_ms, None
        self._current().update(timer="ollama", wall_ms=wall_ms)  # Ollama's llama-server may have told the times
        self.once(joined_ms=min(load, wall_ms) if load is not None and load <= 1.05 * wall_ms else None)

    def has(self, name: str) -> bool:
        """The request in hand has this value already."""
        return name in self.open.get(self._task, {})

    def finish(self, *tasks: int) -> None:
        """These requests are over (none: the one in hand)."""
        for task in tasks or (self._task,):
            values = self.open.pop(task, {})
            times = {name: values.pop(f"stage {name}") for name in _STAGES if f"stage {name}" in values}
            request = Request(**_unfinished(values), stages=times)
            if request.tells:
                self.count += 1
                self.done += [request] if len(self.done) < KEPT else []
                self.slowest = max(request, self.slowest, key=lambda one: one.whole)  # of equal ones the later

    def _current(self) -> dict[str, Any]:
        current = self.open.setdefault(self._task, {"line": self.line})
        if self._n_ctx is not None:
            current.setdefault("n_ctx", self._n_ctx)
        return current


def _unfinished(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a request; times and counts that no timer told are those of its last line of progress."""
    at = values.pop("at", {})
    since, until, shifted, begun = (values.pop(n, 0) for n in ("shifted_from", "shifted_to", "shifted_by", "begun"))
    if "eval_ms" in values or "total_ms" in values:
        return values
    if at.get("decoded_per_s"):
        values |= {"eval_n": at["decoded"], "eval_ms": at["decoded"] / at["decoded_per_s"] * 1e3, "unfinished": True}
    elif shifted and until and until > since:
        count = (values["shifts"] - 1) * shifted  # what is thrown away had been generated since the last shift
        values |= {"eval_n": count, "eval_ms": (until - since) * 1e3, "unfinished": True}
    if "prompt_ms" not in values and "progress_s" in at:
        values |= {"progress": at["progress_s"], "unfinished": True}
        if at.get("prompt_s"):
            values |= {"prompt_ms": at["prompt_s"] * 1e3, "prompt_n": round(at["prompt_s"] * at["prompt_per_s"])}
        elif begun and at["prompt_to"] > begun[0]:
            told = at.get("prompt_at", 0) - begun[1]  # LM Studio tells no tokens
            values |= {"prompt_ms": (at["prompt_to"] - begun[0]) * 1e3, "prompt_n": told or None}
    return values


class _Reader:
    """Feeds a book with the requests' lines, and keeps the fields of a Setup in `found`."""

    def __init__(self) -> None:
        self.book = _Book()
        self.found: dict[str, Any] = {}
        self.rank = len(_TOOLS)
        self._loading_since: float | None = None
        self._encoding_since: float | None = None
        self._listing = False
        self._models: dict[str, int] = {}
        self._model = ""
        self._sizes: dict[tuple[str, str], int] = {}
        self._started: dict[str, float] = {}
        self._stream = self._role = ""

    def feed(self, number: int, line: str) -> None:
        """One line that may hold a fact."""
        text = line[:_LONGEST_FACT]
        self.book.line, self.book.text = number, text
        self.book.stamp = line[:40] if line.startswith("20") else self.book.stamp
        self.rank = next((i for i, (_name, mark) in enumerate(_TOOLS[: self.rank]) if mark.search(line)), self.rank)
        for how, pattern, says in _LINES:
            if found := pattern.search(text):
                keep = self.found.update if how == "setup" else getattr(self.book, how)
                told = {name: _value(name, value) for name, value in found.groupdict().items() if value is not None}
                keep(**says, **told)
        if found := _PATTERNS["timer"].search(text):
            self._timer(found, text[: found.start()])
        if _PATTERNS["warning"].search(text) and not _PATTERNS["harmless"].search(text):
            self.found.setdefault("warning_line", number)
        self._unsupported(text)
        self._loads(text)
        self._image(text)
        # Before a timer, or of a load, "took 8 s" is no request's.
        if self.book.has("timer") and (found := _PATTERNS["wall"].search(text)) and "load" not in text.lower():
            self.book.once(wall_ms=float((found[1] or found[2]).replace(",", "")) * 1e3)
        if '"' in line or "'" in line:
            self._answer(line)
        if "total=" in text and (found := _PATTERNS["access"].search(text)):
            self._access(found)

    def _timer(self, found: re.Match[str], head: str) -> None:
        name = _TIMERS[found["name"]]
        if self.book.has(f"{name}_ms"):
            self.book.finish()
        timer = "print_timings" if "llama_print" in head else "perf" if "perf" in head else "server"
        counts = {f"{name}_n": int(found["count"])} if found["count"] and name in {"prompt", "eval"} else {}
        self.book.put(timer=timer, **{f"{name}_ms": float(found["took_ms"])}, **counts)

    def _unsupported(self, text: str) -> None:
        if "unsupported ops" in text or "****" in text:
            self._listing = "unsupported ops" in text
        elif self._listing and (found := _PATTERNS["unsupported"].search(text)):
            known = self.found.get("unsupported", ())
            self.found["unsupported"] = tuple(dict.fromkeys((*known, found["op"])))[:_MANY]

    def _loads(self, text: str) -> None:
        if found := _PATTERNS["loading"].search(text):
            # One load is told by several voices, and a draft model is another model: the same words count.
            self._model = found.group()
            if self._model in self._models or len(self._models) < _MANY:
                self._models[self._model] = self._models.get(self._model, 0) + 1
            self._loading_since = _clock(text) if self._loading_since is None else self._loading_since
        elif self._models.get(self._model) and _PATTERNS["vocabulary"].search(text):
            # Ollama looks at the vocabulary before it starts a runner, which loads the model.
            self._models[self._model] -= 1
            self._loading_since = None
        elif found := _PATTERNS["started"].search(text):
            at = _clock(text) or 0.0
            self._loading_since = None
            self.book.load_ms = float(found["load_s"]) * 1e3
            # A collector may write a line twice: the same seconds at the same time are one load.
            if abs(self._started.get(found["load_s"], -9.0) - at) > 1.0 and len(self._started) < _MANY:
                self._started[found["load_s"]] = at
                self._loaded(float(found["load_s"]))
        elif self._loading_since is not None and _PATTERNS["begun"].search(text):
            since, self._loading_since = self._loading_since, None
            if (now := _clock(text)) is not None and now >= since:
                self._loaded(now - since)
        if self._models or self._started:
            self.found["loads"] = max(*self._models.values(), len(self._started), 1)

    def _loaded(self, seconds: float) -> None:
        self.found["load_s"] = (*self.found.get("load_s", ()), seconds)[:_MANY]

    def _image(self, text: str) -> None:
        if found := _PATTERNS["batch_size"].search(text):
            self._sizes[found["number"], found["of"]] = int(found["tokens"])
            # llama-server tells no encoder time: it is what passes until the image's first batch begins.
            since, self._encoding_since = self._encoding_since, None
            if since is not None and (now := _clock(text)) is not None and now >= since:
                self.book.event(encode_ms=(round((now - since) * 1e3, 3),))
        elif found := _PATTERNS["batch"].search(text):
            tokens = self._sizes.pop((found["number"], found["of"]), None)
            self.book.event(batches=(Batch(int(found["of"]), tokens, float(found["took_ms"])),))
        elif "encoding mtmd batch" in text:
            self._encoding_since = _clock(text)
        elif "encoded in" in text or "encoding done" in text:
            self._encoding_since = None

    def _answer(self, line: str) -> None:
        """OpenAI's `usage`, llama-server's `timings`, Ollama's durations, and Opsin's stages."""
        book, pairs = self.book, _PATTERNS["pair"].findall(line)
        chunk = _PATTERNS["id"].search(line) if "chat.completion.chunk" in line else None
        stream = chunk[1] if chunk else ""
        book.same, self._stream = bool(stream) and stream == self._stream, stream or self._stream
        self._said(line)
        if book.has("finish") and not book.same and any(word and name in _ENDS for name, _number, word in pairs):
            book.finish()
        for name, number, word in pairs:
            if word and name in _ENDS:
                book.once(finish=word)
                self._role = ""
            elif number and name in _TIMES:
                field, factor, timer = _TIMES[name]
                book.put(timer=timer, **{field: float(number) * factor})
            elif number and name in _COUNTS:
                book.put(**{_COUNTS[name]: int(float(number))})
            elif number and name.endswith("_ms") and name[:-3] in _STAGES:
                book.put(**{f"stage {name[:-3]}": float(number)})
                book.once(wall_ms=float(number) if name == "total_ms" else None)
        book.same = False

    def _said(self, line: str) -> None:
        """Whether an answer has words, and thinking; what a question says is neither."""
        for name, word in _PATTERNS["said"].findall(line):
            if name == "role":
                self._role = word
            elif word and (name != "content" or self._role not in {"user", "system", "tool", "developer"}):
                if self.book.has("finish") and self.book.has("completion_tokens") and not self.book.same:
                    self.book.finish()
                self.book.once(**{"spoke" if name == "content" else "thought": True})

    def _access(self, found: re.Match[str]) -> None:
        """A line of Opsin's access log."""
        book, whole = self.book, float(found["total_s"]) * 1e3
        tokens = {"prompt_tokens": int(found["prompt"]), "completion_tokens": int(found["answer"])}
        book.put(timer="opsin", wall_ms=whole, **tokens, **{"stage total": whole})
        for name, value, end in _PATTERNS["access_field"].findall(found["fields"]):
            if name in _STAGES:
                book.put(**{f"stage {name}": float(value) * 1e3})
            elif end:
                book.once(finish=end)


def _value(name: str, text: str) -> Any:
    """The field that a line of the table tells: times as floats, other numbers as integers, words as they are."""
    if name == "encode_ms":
        return (float(text),)
    if name.endswith("_ms"):
        return float(text) if re.fullmatch(_NUMBER, text) else go_duration(text)
    if name.endswith("_s"):  # h:mm:ss or m:ss
        return reduce(lambda total, part: 60 * total + float(part), text.split(":"), 0.0)
    return int(text) if text.isdecimal() else text


def go_duration(text: str) -> float | None:
    """Milliseconds of a duration as Go prints it ("1m2.5s", "78.93µs"); None if it is none."""
    parts = _PATTERNS["go_duration"].findall(text)
    return sum(float(number) * _GO_MS[unit] for number, unit in parts) if parts else None
