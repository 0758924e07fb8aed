"""Keeps terminal control sequences out of what is printed: stripped from answers, shown as escapes in names."""

from __future__ import annotations

import re

_STRING = "\x1b[\\]PX^_]|[\x9d\x90\x98\x9e\x9f]"  # OSC, DCS, SOS, PM, APC: titles, links, clipboard
_SEQUENCE = re.compile(
    rf"""
    (?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]        # CSI: colours, cursor, screen
    | (?:{_STRING}).*?(?:\x07|\x1b\\|\x9c)
    | \x1b[ -/]*(?![\[\]PX^_])[0-~]         # two-byte escapes
    """,
    re.VERBOSE | re.DOTALL,
)
_UNFINISHED = re.compile(rf"(?:\x1b|\x9b)[ -/]*\Z|(?:\x1b\[|\x9b)[0-?]*[ -/]*\Z|(?:{_STRING}).*\Z", re.DOTALL)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

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
        unfinished = _UNFINISHED.search(text)
        if unfinished is not None:
            held = unfinished.group()
            self._held = held if len(held) <= MAX_HELD else ""
            text = text[: unfinished.start()]
        return _CONTROL.sub("", text)


def printable(text: str) -> str:
    """A whole text without control sequences; one that is never finished hides what follows it."""
    return ControlStripper().feed(text)


def escaped(text: str) -> str:
    r"""A sentence or a name as one line, with every control character shown as an escape: `\x1b`, `\n`."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
