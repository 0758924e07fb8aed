"""Drift: an answer that goes on, never in the same order, but says nothing it has not said before.

Two ways of drifting are told apart.

Nothing new: a window over the last segments holds hardly a new word or number, and nearly all it says was said
before. Both must hold. New numbers are what tables and logs live on, and new combinations of old words are what
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
LIST_ITEMS = 28  # segments in a window made of short items
PROSE_WORDS = 110  # words in a window made of sentences
LIST_SAID = 0.88  # share of the short items that must have been said before
PROSE_SAID = 0.62  # share of the sequences of sentences that must have been said before
MAX_NEWS = 2  # new words and numbers a window may hold
MIN_KINDS = 6  # different segments in a window: fewer are categories (yes and no, A to D), not a drifting list

# Retelling.
RETOLD_WORDS = 70  # words in a window
RETOLD_SENTENCES = 5  # and sentences, at least
RETOLD_NEWS = 0.12  # new words a word, at most
RETOLD_SAID = 0.45  # share of the sequences said before, at least
RETOLD_KIN = 0.75  # resemblance to the nearest earlier sentence, on average, at least
RETOLD_ORDER = 0.5  # resemblance to the sentence a fixed number back, on average, at most
_LOOK_BACK = 24
_PERIODS = 12


class _Item(NamedTuple):
    """`margin` is by how much a segment says old things more than it may, times its share of the window."""

    share: float
    margin: float
    news: int
    key: int


class _NothingNew:
    """The window of the first rule; a short item and a sentence fill it to different shares."""

    def __init__(self) -> None:
        self._window: deque[_Item] = deque()
        self._share = 0.0

    def take(self, segment: Segment) -> bool:
        length = len(segment.words)
        if length <= GRAM:
            share, enough = 1 / LIST_ITEMS, LIST_SAID
        else:
            share, enough = min(length, PROSE_WORDS // 4) / PROSE_WORDS, PROSE_SAID
        window = self._window
        window.append(_Item(share, share * (segment.said - enough), segment.news, hash(segment.words)))
        self._share += share
        while self._share - window[0].share >= 1 - 1e-6:
            self._share -= window.popleft().share
        return (
            self._share >= 1 - 1e-6
            and sum(item.margin for item in window) >= 0
            and sum(item.news for item in window) <= MAX_NEWS
            and len({item.key for item in window}) >= MIN_KINDS
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
        if sum(max(sentence.kin, default=0.0) for sentence in window) < RETOLD_KIN * count:
            return False
        return all(
            sum(sum(islice(sentence.kin, period, period + 1)) for sentence in window) <= RETOLD_ORDER * count
            for period in range(_PERIODS)
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
            for rule in self._rules:
                drifts |= rule.take(segment)
        return drifts
