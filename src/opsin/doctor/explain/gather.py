"""A log in, facts out: which tool wrote it, what its machine looks like, and its requests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import BinaryIO

from opsin.core.errors import BadInput
from opsin.doctor.explain.answers import read_answer
from opsin.doctor.explain.lines import clean_lines
from opsin.doctor.explain.machine import Machine, MachineReader
from opsin.doctor.explain.request import Book, Request
from opsin.doctor.explain.timings import Timings

TOOLS = (
    ("Opsin", re.compile(r'"image_prefill_ms"| tokens=\d{1,9}\+\d{1,9} (?:ttft|total)=')),
    ("Ollama", re.compile(r"\[GIN\]|source=\w+\.go|total_duration|^total duration:|\bollama\[")),
    ("llama-cpp-python", re.compile(r"Llama\.generate|chat formats from metadata|llama_cpp|'completion_tokens'")),
    ("llama-server", re.compile(r"\bsrv |\bslot +\w+:|llama-server|\"predicted_ms\"|print_timing: |update_slots")),
    ("llama-mtmd-cli", re.compile(r"experimental CLI|image slice encoded|clip_ctx: CLIP|alloc_compute_meta")),
    ("llava-cli", re.compile(r"encode_image_with_clip")),
)
"""Names of tools, the surest witness first: Ollama runs llama-server, and llama-server prints llama.cpp's lines."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a log holds.

    `requests` are in the log's order (a thousand at most), `count` is how many there were, `worst` is the one
    explained: the slowest, and of equals the last.
    """

    tool: str
    machine: Machine
    requests: tuple[Request, ...]
    count: int
    worst: Request

    @property
    def position(self) -> int:
        """Which request is explained, from 1; 0 beyond those that are kept."""
        return self.requests.index(self.worst) + 1 if self.worst in self.requests else 0


def gather(stream: BinaryIO) -> Facts:
    """Read a log to its end, in bounded memory. OSError when it cannot be read; BadInput when it tells nothing."""
    book, reader = Book(), MachineReader()
    timings = Timings(book)
    rank = len(TOOLS)
    for line in clean_lines(stream):
        rank = next((i for i, (_name, mark) in enumerate(TOOLS[:rank]) if mark.search(line.text)), rank)
        reader.feed(line)
        timings.feed(line)
        read_answer(line, book)
    book.end()
    if not book.count and not reader.machine.known:
        raise BadInput(
            "this log holds nothing that opsin explain knows: give it the whole output of llama-cpp-python "
            "(verbose=True), llama-server, llama-mtmd-cli, Ollama or Opsin, with its timings"
        )
    tool = TOOLS[rank][0] if rank < len(TOOLS) else "llama.cpp"
    return Facts(tool, reader.machine, tuple(book.done), book.count, book.slowest or Request())
