"""Bytes of any log in, clean lines with their time of day out; nothing but the line in hand is kept."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO

LONGEST = 1 << 20
"""Characters of a piece: a longer line (a logged picture) comes in several."""
LONGEST_FACT = 2000
"""Characters of a line in which the lines of a tool are looked for; only answers, in JSON, are longer."""
_BOMS = (b"\xff\xfe", b"\xfe\xff")
_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_SERVER_CLOCK = re.compile(r"(?<!\S)(\d{1,9})\.(\d\d)\.(\d{3})\.(\d{3}) [A-Z] ")
_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,9}))?")
_HEAD = 120
"""Where a time stamp is looked for: prefixes of containers and journals stand before it."""
_WORTH = re.compile(
    r"time\s*=|duration|_ms\b|_n\b|eval[ _]count|tokens|CLIP|clip|flash|offload|encod|image|batch|KV|memory|slot|n_ctx"
    r"|threads|vocab_only|loaded|loading|runner|buffer size|unsupported|type = |asserts|build|\[GIN\]|cost|took"
    r"|time is|[Ee]lapsed|page faults|of CPU|reason|Llama\.generate|chat formats|experimental CLI|truncat|total=",
)


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its number from 1, its text without colours, its time in seconds of any origin where it has one."""

    number: int
    text: str
    clock: float | None


def clean_lines(stream: BinaryIO) -> Iterator[Line]:
    """The lines that may hold a fact. UTF-8 and UTF-16 with a mark; other bytes become replacement signs.

    Raises OSError when the stream cannot be read.
    """
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(io.BytesIO(stream.read()))
    encoding = "utf-16" if buffered.peek(2)[:2] in _BOMS else "utf-8"
    text = io.TextIOWrapper(buffered, encoding=encoding, errors="replace")
    number = 0
    while raw := text.readline(LONGEST):
        number += raw.endswith("\n")
        if _WORTH.search(raw):
            line = _COLOURS.sub("", raw).rstrip()
            yield Line(number, line, _clock(line[:_HEAD]))
    text.detach()


def _clock(head: str) -> float | None:
    if found := _SERVER_CLOCK.search(head):
        minutes, seconds, milli, micro = map(int, found.groups())
        return minutes * 60 + seconds + milli / 1e3 + micro / 1e6
    if found := _DATE.search(head):
        try:
            day = datetime(*map(int, found.groups()[:6]))  # type: ignore[arg-type]  # noqa: DTZ001 - differences only
        except ValueError:
            return None
        return (
            day.toordinal() * 86400.0
            + day.hour * 3600
            + day.minute * 60
            + day.second
            + float(f"0.{found.group(7) or 0}")
        )
    return None
