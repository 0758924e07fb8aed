"""Exact cycles: the last tokens, or the last characters, are one passage again and again."""

from __future__ import annotations

# Copies alone do not make a runaway: a rule of 80 dashes, a row of zeros and a chorus sung three times are cycles
# too. So the whole cycle has to be long, and a long passage has to come more than twice.
MIN_TOKENS = 160
MIN_CHARS = 600
COPIES = 3
MAX_PERIOD_TOKENS = 256
MAX_PERIOD_CHARS = 1024
# How many tokens in a row find the place of an earlier copy.
_KEY = 3
_PROBE = 24


class TokenCycle:
    """Follows one candidate period through the tokens, one look a token.

    When the token breaks the candidate, the next one is the distance to the last place where the latest three tokens
    stood. Inside a true cycle that distance is soon a multiple of its period, and then never broken again.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._recent: dict[tuple[int, ...], int] = {}
        self._older: dict[tuple[int, ...], int] = {}
        self._base = 0
        self._period = 0
        self._matched = 0

    def feed(self, token: int) -> bool:
        """Whether the tokens up to this one end in a cycle that is long enough."""
        tokens = self._tokens
        tokens.append(token)
        last = len(tokens) - 1
        period = self._period
        if period and tokens[last - period] == token:
            self._matched += 1
        else:
            self._period = period = self._distance(last)
            self._matched = _KEY if period else 0
        self._remember(last)
        return period > 0 and self._matched >= max(MIN_TOKENS, COPIES * period) - period

    def _distance(self, last: int) -> int:
        key = tuple(self._tokens[last - _KEY + 1 :])
        place = self._recent.get(key, self._older.get(key))
        if place is None:
            return 0
        distance = self._base + last - place
        # The place may lie before what is kept: then the period would be too long anyway.
        return distance if distance <= MAX_PERIOD_TOKENS and last - distance - _KEY >= 0 else 0

    def _remember(self, last: int) -> None:
        self._recent[tuple(self._tokens[last - _KEY + 1 :])] = self._base + last
        if last + 1 >= 4 * MAX_PERIOD_TOKENS:
            # Keep two periods of tokens; places of older ones go one generation later.
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
    for _ in range(4):
        start = text.rfind(probe, max(0, len(text) - MAX_PERIOD_CHARS - _PROBE), end)
        if start < 0:
            return False
        period = len(text) - _PROBE - start
        span = max(MIN_CHARS, COPIES * period)
        if span <= len(text) and text[-span:-period] == text[period - span :]:
            return True
        end = start + _PROBE - 1
    return False
