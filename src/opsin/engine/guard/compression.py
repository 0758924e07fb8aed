"""Compression: the latest text is the same few things again, too irregular for a cycle and too odd for words."""

from __future__ import annotations

import re
import zlib

# The last SPAN characters are packed every STRIDE tokens. A cycle with slips packs to 3 to 7 %. Legitimate text stays
# above 8 %: logs, counted verses and generated records, which differ in a number a line, and a long passage quoted
# word for word once more, since the span holds two copies at most of anything longer than half of it.
STRIDE = 64
SPAN = 2048
MAX_RATIO = 0.065

_BLANKS = re.compile(r"\s+")


def squeeze(text: str) -> str:
    """Blanks count once: deep indentation is no repetition."""
    return _BLANKS.sub(" ", text)


def packs_too_well(text: str) -> bool:
    """Whether the end of a squeezed text packs to almost nothing."""
    if len(text) < SPAN:
        return False
    latest = text[-SPAN:].encode("utf-8", "replace")
    return len(zlib.compress(latest, 6)) <= MAX_RATIO * len(latest)
