"""Drift: an answer that goes on, never in the same order, but says nothing it has not said before.

Two ways of drifting are told apart.

Nothing new: the last items of a list hold hardly a new word or number, and nearly all of them were named before. Both
must hold. A number in an item makes it a new one: tables and logs live on that.

Retelling: the last sentences are made of old sequences of words to a good part, they resemble earlier sentences in
their telling words, some of them fully, and they come back in no order. A new word now and then (another word for the
same thing) does not matter. "Some fully" leaves captions of similar images alone, which combine old words anew. "In
no order" leaves alone what is repetitive by plan: in a song, a contract or a form the sentence that resembles this one
stands a fixed number of sentences back, in a retelling it stands anywhere.

Code and markup say old things all the time: a segment with one of their marks empties both windows.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from opsin.engine.guard.segments import GRAM, Segments

if TYPE_CHECKING:
    from opsin.engine.guard.segments import Segment

# Nothing new.
ITEMS = 28  # items in a window
ITEM_WORDS = 8  # a longer segment is no item, and ends the list
ITEMS_SAID = 0.88  # share of the items that must have been said before
ITEMS_NEWS = 2  # new words and numbers a window may hold
ITEM_KINDS = 6  # different items in a window: fewer are categories (yes and no, A to D), not a drifting list

# Retelling.
RETOLD_WORDS = 70  # words in a window
RETOLD_SENTENCES = 7  # and sentences, at least
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


class _Sentence:
    """`shorts` counts the short items before it; `earlier` has the telling words of earlier ones, the latest first."""

    __slots__ = ("_earlier", "_kin", "_telling", "news", "said", "shorts", "words")

    def __init__(self, segment: Segment, shorts: int, earlier: deque[frozenset[str]]) -> None:
        self.words = len(segment.words)
        self.news = segment.news
        self.said = segment.said
        self.shorts = shorts
        self._earlier = tuple(earlier)
        self._kin: tuple[float, ...] | None = None
        self._telling = frozenset(
            word for word in segment.words if len(word) > 3 or word[0].isdigit() or word[0] > "\u3000"
        )
        earlier.appendleft(self._telling)

    @property
    def kin(self) -> tuple[float, ...]:
        """`kin[p]` is the resemblance to the sentence p + 1 back: the share of telling words, 0 to 1."""
        if self._kin is None:
            mine = self._telling
            self._kin = tuple(
                len(mine & other) / min(len(mine), len(other)) if mine and other else 0.0 for other in self._earlier
            )
        return self._kin


class _Retelling:
    """The window of the second rule: the last sentences."""

    def __init__(self) -> None:
        self._window: deque[_Sentence] = deque()
        self._earlier: deque[frozenset[str]] = deque(maxlen=_LOOK_BACK)
        self._words = 0
        self._shorts = 0

    def clear(self) -> None:
        self._window.clear()
        self._words = self._shorts = 0

    def take(self, segment: Segment) -> bool:
        if len(segment.words) <= GRAM:
            self._shorts += 1
            return False
        window = self._window
        window.append(_Sentence(segment, self._shorts, self._earlier))
        self._shorts = 0
        self._words += window[-1].words
        while len(window) > RETOLD_SENTENCES and self._words - window[0].words >= RETOLD_WORDS:
            self._words -= window.popleft().words
        return self._words >= RETOLD_WORDS and len(window) >= RETOLD_SENTENCES and self._retold()

    def _retold(self) -> bool:
        window, count = self._window, len(self._window)
        # Cheap questions first: only few texts come to the comparison of sentences.
        if sum(sentence.news for sentence in window) > RETOLD_NEWS * self._words:
            return False
        if sum(sentence.said * sentence.words for sentence in window) < RETOLD_SAID * self._words:
            return False
        # Many short lines between: headings, verses, a form; no prose.
        if 2 * sum(sentence.shorts for sentence in window) > count:
            return False
        nearest = [max(sentence.kin, default=0.0) for sentence in window]
        if sum(nearest) < RETOLD_KIN * count or sum(kin == 1 for kin in nearest) < RETOLD_SAME * count:
            return False
        # A sentence said twice running is in order too: a verse may begin so.
        return all(
            sum(max(_kin(sentence, period), _kin(sentence, 0) == 1) for sentence in window) <= RETOLD_ORDER * count
            for period in range(_LOOK_BACK)
        )


def _kin(sentence: _Sentence, period: int) -> float:
    return sentence.kin[period] if period < len(sentence.kin) else 0.0


class Drift:
    """Reads an answer's text, in spans that may end anywhere."""

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
