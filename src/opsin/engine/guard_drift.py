"""Drift: an answer that goes on, never in the same order, but says nothing it has not said before.

Two ways of drifting are told apart.

Nothing new: a window over the last items holds hardly a new word or number, and nearly all of them were named before. Both must hold. New numbers are what tables and logs live on, and new combinations of old words are what
captions of similar pictures live on.

Retelling: sentences that each resemble an earlier one in their telling words, that are made of old sequences of words
to a good part, and that come back in no order. The last point protects what is repetitive by plan: in a song, a
contract or a form the sentence that resembles this one stands a fixed number of sentences back, in a retelling
it stands anywhere. Then some new words (another word for the same thing) do not matter.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from opsin.engine.guard_segments import GRAM, Segments

if TYPE_CHECKING:
    from opsin.engine.guard_segments import Segment

# Nothing new.
ITEMS = 28  # items in a window
ITEM_WORDS = 8  # a longer segment is no item, and ends the list
ITEMS_SAID = 0.88  # share of the items that must have been said before
ITEMS_NEWS = 2  # new words and numbers a window may hold
ITEM_KINDS = 6  # different items in a window: fewer are categories (yes and no, A to D), not a drifting list

# Retelling.
RETOLD_WORDS = 70  # words in a window
RETOLD_SENTENCES = 5  # and sentences, at least
RETOLD_NEWS = 0.15  # new words a word, at most
RETOLD_SAID = 0.45  # share of the sequences said before, at least
RETOLD_KIN = 0.7  # resemblance to the nearest earlier sentence, on average, at least
RETOLD_SAME = 0.35  # share of the sentences that resemble an earlier one fully
RETOLD_ORDER = 0.6  # resemblance to the sentence a fixed number back, on average, at most
_LOOK_BACK = 32


class _NothingNew:
    """The window of the first rule: the last items."""

    def __init__(self) -> None:
        self._window: deque[Segment] = deque(maxlen=ITEMS)

    def clear(self) -> None:
        self._window.clear()

    def take(self, segment: Segment) -> bool:
        window = self._window
        if len(segment.words) > ITEM_WORDS:
            window.clear()
            return False
        window.append(segment)
        return (
            len(window) == ITEMS
            and sum(item.said for item in window) >= ITEMS_SAID * ITEMS
            and sum(item.news for item in window) <= ITEMS_NEWS
            and len({item.words for item in window}) >= ITEM_KINDS
        )


class _Sentence(NamedTuple):
    """`kin[p]` is the resemblance to the sentence p + 1 back, 0 to 1; `shorts` counts the short items before it."""

    words: int
    news: int
    said: float
    kin: tuple[float, ...]
    shorts: int


class _Retelling:
    """The window of the second rule: the last sentences."""

    def __init__(self) -> None:
        self._window: deque[_Sentence] = deque()
        self._earlier: deque[frozenset[str]] = deque(maxlen=_LOOK_BACK)  # the latest first
        self._words = 0
        self._shorts = 0

    def clear(self) -> None:
        self._window.clear()
        self._words = self._shorts = 0

    def take(self, segment: Segment) -> bool:
        length = len(segment.words)
        if length <= GRAM:
            self._shorts += 1
            return False
        telling = frozenset(word for word in segment.words if len(word) > 3 or word[0].isdigit() or word[0] > "\u3000")
        kin = tuple(
            len(telling & other) / min(len(telling), len(other)) if telling and other else 0.0
            for other in self._earlier
        )
        self._earlier.appendleft(telling)
        window = self._window
        window.append(_Sentence(length, segment.news, segment.said, kin, self._shorts))
        self._shorts = 0
        self._words += length
        while self._words - window[0].words >= RETOLD_WORDS:
            self._words -= window.popleft().words
        return self._words >= RETOLD_WORDS and len(window) >= RETOLD_SENTENCES and self._retold()

    def _retold(self) -> bool:
        window, count = self._window, len(self._window)
        if sum(sentence.news for sentence in window) > RETOLD_NEWS * self._words:
            return False
        if sum(sentence.said * sentence.words for sentence in window) < RETOLD_SAID * self._words:
            return False
        # Lines of code and headings between: this is no prose.
        if 2 * sum(sentence.shorts for sentence in window) > count:
            return False
        nearest = [max(sentence.kin, default=0.0) for sentence in window]
        if sum(nearest) < RETOLD_KIN * count or sum(kin == 1 for kin in nearest) < RETOLD_SAME * count:
            return False
        return all(
            sum(sum(islice(sentence.kin, period, period + 1)) for sentence in window) <= RETOLD_ORDER * count
            for period in range(_LOOK_BACK)
        )


class Drift:
    """Reads an answer's text, in stretches that may end anywhere."""

    def __init__(self) -> None:
        self._segments = Segments()
        self._rules = (_NothingNew(), _Retelling())

    def read(self, text: str) -> bool:
        """Take more text; True when the answer drifts."""
        drifts = False
        for segment in self._segments.read(text):
            if not segment.plain:
                for rule in self._rules:
                    rule.clear()
                continue
            for rule in self._rules:
                drifts |= rule.take(segment)
        return drifts
