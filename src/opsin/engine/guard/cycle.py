"""Exact cycles: the last tokens, or the last characters, are one passage again and again."""

from __future__ import annotations

from collections.abc import Sequence

# Copies alone do not make a runaway: a rule of 80 dashes, a row of zeros and a chorus sung three times are cycles
# too. So the cycle has to be long as a whole, and a long passage has to come more than twice.
MIN_TOKENS = 192
MIN_CHARS = 768
COPIES = 3
COPIES_OF_LONG = 4  # a record or a paragraph may well stand three times
LONG_TOKENS = 80
LONG_CHARS = 320
# A longer passage comes back too rarely to be told from a quotation within a usual limit on tokens.
MAX_PERIOD_TOKENS = 256
MAX_PERIOD_CHARS = 1024
_KEY = 3  # tokens in a row that find the place of an earlier copy
_PROBE = 24  # characters that do
_TRIES = 4


class TokenCycle:
    """Follows one candidate period through the tokens.

    When a token breaks the candidate, the next one is the distance to the last place where the latest three tokens
    stood. Inside a true cycle that distance is soon a multiple of its period, and then never broken again.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._recent: dict[tuple[int, ...], int] = {}
        self._older: dict[tuple[int, ...], int] = {}
        self._base = 0
        self._period = 0
        self._matched = 0

    def feed(self, fresh: Sequence[int]) -> bool:
        """Take tokens in; whether the answer ended in a long enough cycle with one of them."""
        tokens, found = self._tokens, False
        period, matched = self._period, self._matched
        needed = _span(period, LONG_TOKENS, MIN_TOKENS) - period
        last = len(tokens) - 1
        for token in fresh:
            tokens.append(token)
            last += 1
            key = tuple(tokens[-_KEY:])
            if period and tokens[last - period] == token:
                matched += 1
            else:
                period, matched = self._distance(key, last), _KEY
                needed = _span(period, LONG_TOKENS, MIN_TOKENS) - period
            self._recent[key] = self._base + last
            found |= period > 0 and matched >= needed
        self._period, self._matched = period, matched
        self._forget(last)
        return found

    def _distance(self, key: tuple[int, ...], last: int) -> int:
        """How far back these three tokens stood before; 0 when they did not, or too far."""
        if last < _KEY:
            return 0
        place = self._recent.get(key, self._older.get(key))
        distance = 0 if place is None else self._base + last - place
        return distance if distance <= MAX_PERIOD_TOKENS else 0

    def _forget(self, last: int) -> None:
        if last + 1 >= 4 * MAX_PERIOD_TOKENS:
            # What is kept must reach one longest period back, places included: two generations of them always do.
            cut = last + 1 - 2 * MAX_PERIOD_TOKENS
            del self._tokens[:cut]
            self._base += cut
            self._older, self._recent = self._recent, {}


def cyclic_end(text: str) -> bool:
    """Whether the text ends in a cycle of characters that is long enough, whatever the borders of its tokens.

    The end of the text is searched in what stands before it; each distance found is tried as a period. Few are tried:
    in a true cycle the nearest distance that holds for the whole probe is nearly always the period.
    """
    probe = text[-_PROBE:]
    end = len(text) - 1
    for _ in range(_TRIES):
        start = text.rfind(probe, max(0, len(text) - MAX_PERIOD_CHARS - _PROBE), end)
        if start < 0:
            return False
        period = len(text) - _PROBE - start
        span = _span(period, LONG_CHARS, MIN_CHARS)
        if span <= len(text) and text[-span:-period] == text[period - span :]:
            return True
        end = start + _PROBE - 1
    return False


def _span(period: int, long: int, least: int) -> int:
    """How far a cycle must reach back."""
    return max(least, period * (COPIES if period <= long else COPIES_OF_LONG))
