"""From token bytes to text a caller may see: whole characters, and nothing that belongs to a stop string.

Both readers are incremental, and both promise the same thing: however the input is cut, the pieces they give back
join to what reading it whole would give.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from opsin.core.errors import BadParameter

if TYPE_CHECKING:
    from collections.abc import Iterable


class Utf8Stream:
    """Decodes UTF-8 that arrives in pieces, such as the bytes of tokens.

    A character cut by the end of a piece waits for its other bytes. Bytes that can no longer become a character turn
    into U+FFFD, exactly as `bytes.decode("utf-8", "replace")` does it.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes, possibly none."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, else nothing."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class _Matcher:
    """How much of one stop string the text read so far ends with (Knuth, Morris, Pratt: one look a character)."""

    __slots__ = ("failure", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self.failure = [0] * len(stop)
        border = 0
        for i in range(1, len(stop)):
            while border and stop[i] != stop[border]:
                border = self.failure[border - 1]
            border += stop[i] == stop[border]
            self.failure[i] = border

    def advance(self, char: str) -> bool:
        matched = self.matched
        while matched and char != self.stop[matched]:
            matched = self.failure[matched - 1]
        matched += char == self.stop[matched]
        self.matched = matched
        return matched == len(self.stop)


class StopStrings:
    """Cuts streamed text before the first stop string.

    First is the one that is complete first; when two end at the same character, the longer one. So an answer ends at
    the earliest moment at which its text contains a stop string, whatever the borders of its tokens.

    Raises BadParameter for an empty stop string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        unique = sorted(set(stops), key=len, reverse=True)
        if "" in unique:
            raise BadParameter("A stop string is empty: leave it out.")
        self._matchers = [_Matcher(stop) for stop in unique]
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that can be shown now, and whether a stop string was met.

        The longest end of the text that may still become a stop string is held back, no more. After a hit nothing
        comes any more.
        """
        if self.found is not None:
            return "", True
        matchers = self._matchers
        if not matchers:
            return text, False
        for i, char in enumerate(text):
            # Every matcher has to see the character, also after one of them is complete: the first in the list is
            # the longest.
            complete = [matcher for matcher in matchers if matcher.advance(char)]
            if complete:
                self.found = complete[0].stop
                whole = self._held + text[: i + 1]
                self._held = ""
                return whole[: len(whole) - len(self.found)], True
        whole = self._held + text
        safe = len(whole) - max(matcher.matched for matcher in matchers)
        self._held = whole[safe:]
        return whole[:safe], False

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        for matcher in self._matchers:
            matcher.matched = 0
        return held
