"""Strips terminal control sequences from what models print, however the text is cut into pieces."""

from __future__ import annotations

import re

_SEQUENCE = re.compile(
    r"""
    \x1b\[[0-?]*[ -/]*[@-~]              # CSI: colours, cursor, screen
    | \x1b[\]PX^_].*?(?:\x07|\x1b\\|\x9c) # OSC, DCS, SOS, PM, APC: titles, links, clipboard
    | \x1b[ -/]*[0-~]                    # two-byte escapes
    | \x9b[0-?]*[ -/]*[@-~]              # CSI as one C1 byte
    | [\x9d\x90\x98\x9e\x9f].*?(?:\x07|\x1b\\|\x9c)
    """,
    re.VERBOSE | re.DOTALL,
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_START = re.compile("[\x1b\x9b\x9d\x90\x98\x9e\x9f]")

MAX_HELD = 4096
"""A sequence that is not complete after this many characters never will be; what it hid is dropped."""


class ControlStripper:
    """Incremental: a sequence that is not complete yet is held back. Line ends and tabs stay; so does all else."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        """What of the text can be shown."""
        text = _SEQUENCE.sub("", self._held + text)
        self._held = ""
        start = _START.search(text)
        if start is not None:
            held = text[start.start() :]
            self._held = held if len(held) <= MAX_HELD else ""
            text = text[: start.start()]
        return _CONTROL.sub("", text)


def printable(text: str) -> str:
    """A whole text without control sequences; an unfinished one loses its beginning."""
    return _CONTROL.sub("", _SEQUENCE.sub("", text))
