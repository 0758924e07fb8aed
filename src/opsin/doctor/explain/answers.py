"""Reads numbers from answers and accounts: OpenAI `usage`, llama-server's `timings`, Ollama's durations, Opsin's.

A line need not be valid JSON: values are found by their names, so that a pretty-printed answer, a Python dictionary
and an answer inside another log line all serve.
"""

from __future__ import annotations

import re

from opsin.core.stages import Stage
from opsin.doctor.explain.lines import LONGEST_FACT, Line
from opsin.doctor.explain.request import Book

_PAIR = re.compile(
    r"""(?<!\\)["']([a-z_]{4,24})(?<!\\)["']\s*:\s*(?:(\d{1,18}(?:\.\d{1,18})?)|["']([^"'\\]{1,40})["'])"""
)
_ENDS = frozenset({"finish_reason", "done_reason"})
_SERVER = {"prompt_ms": "prompt_ms", "predicted_ms": "eval_ms"}
_COUNTS = {
    "prompt_n": "prompt_n",
    "predicted_n": "eval_n",
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "completion_tokens",
    "total_tokens": "total_tokens",
    "image_tokens": "image_tokens",
}
_OLLAMA = {
    "total_duration": "total_ms",
    "load_duration": "load_ms",
    "prompt_eval_duration": "prompt_ms",
    "eval_duration": "eval_ms",
}
_OLLAMA_COUNTS = {"prompt_eval_count": "prompt_n", "eval_count": "eval_n"}
_VERBOSE = re.compile(r"^((?:total|load|prompt eval|eval) (?:duration|count)):\s+(\S+)")
_GIN = re.compile(r"\[GIN\].*\|\s*\d{3}\s*\|\s*(\S+)\s*\|.*/(?:api/(?:chat|generate)|v1/(?:chat/)?completions)")
_GO = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(h|ms|m|µs|us|μs|ns|s)")
_GO_MS = {"h": 3.6e6, "m": 6e4, "s": 1e3, "ms": 1.0, "µs": 1e-3, "μs": 1e-3, "us": 1e-3, "ns": 1e-6}
_ACCESS = re.compile(r" tokens=(\d{1,9})\+(\d{1,9}) .*?total=(\d{1,9}(?:\.\d{1,9})?)s(.*)$")
_FIELD = re.compile(r"(\w+)=(\d{1,9}(?:\.\d{1,9})?)s\b|\bend=(\w+)")
STAGES = frozenset(stage.value for stage in Stage)


def read_answer(line: Line, book: Book) -> None:
    """Add what the line says to the request it belongs to."""
    text = line.text
    if '"' in text or "'" in text:
        pairs = _PAIR.findall(text)
        if book.has("finish") and any(word and name in _ENDS for name, _number, word in pairs):
            book.finish()
        for name, number, word in pairs:
            _pair(line.number, book, name, number, word)
    text = text[:LONGEST_FACT]
    if found := _VERBOSE.search(text):
        _verbose(line.number, book, *found.groups())
    elif found := _GIN.search(text):
        book.once(line.number, wall_ms=go_duration(found.group(1)), timer="ollama")
        book.finish()
    elif "total=" in text and (found := _ACCESS.search(text)):
        _access(line.number, book, found)


def go_duration(text: str) -> float | None:
    """Milliseconds of a duration as Go prints it ("1m2.5s", "78.93µs"); None if it is none."""
    parts = _GO.findall(text)
    return sum(float(number) * _GO_MS[unit] for number, unit in parts) if parts else None


def _pair(line: int, book: Book, name: str, number: str, word: str) -> None:
    if word and (name in _ENDS or name == "limit"):
        book.once(line, finish=word if name in _ENDS else f"limit:{word}")
    elif not number:
        return
    elif name in _OLLAMA:
        book.put(line, timer="ollama", **{_OLLAMA[name]: float(number) / 1e6})
    elif name in _OLLAMA_COUNTS:
        book.put(line, **{_OLLAMA_COUNTS[name]: int(float(number))})
    elif name in _SERVER:
        book.once(line, timer="server")
        book.put(line, **{_SERVER[name]: float(number)})
    elif name in _COUNTS:
        book.put(line, **{_COUNTS[name]: int(float(number))})
    elif name == "total_ms" or (name.endswith("_ms") and name[:-3] in STAGES):
        book.stage(line, name[:-3], float(number))
        if name == "total_ms":
            book.once(line, wall_ms=float(number))


def _verbose(line: int, book: Book, name: str, value: str) -> None:
    key = name.replace(" ", "_")
    if key in _OLLAMA:
        book.put(line, timer="ollama", **{_OLLAMA[key]: go_duration(value)})
    elif value.isdigit() and key in _OLLAMA_COUNTS:
        book.put(line, **{_OLLAMA_COUNTS[key]: int(value)})


def _access(line: int, book: Book, found: re.Match[str]) -> None:
    prompt, answer, total, rest = found.groups()
    whole = float(total) * 1e3
    book.put(line, timer="opsin", prompt_tokens=int(prompt), completion_tokens=int(answer), wall_ms=whole)
    book.stage(line, "total", whole)
    for name, value, end in _FIELD.findall(rest):
        if name in STAGES:
            book.stage(line, name, float(value) * 1e3)
        elif end:
            book.once(line, finish=f"limit:{end}" if end not in {"stop", "length"} else end)
