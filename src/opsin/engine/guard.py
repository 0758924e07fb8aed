"""The guard: notices, while an answer streams, that it will not end by itself. It knows no engine and no model.

A false stop is worse than a late one, since the limit on tokens ends every answer anyway. So the constants were pushed
until nothing legitimate was stopped (tests/guard: tables, code, songs, forms, captions; and files of real machines),
and only then as near to the runaways as that left room. Runaway lists in code or JSON are left to cycles, compression
and the limit: there, repetition is the normal case. So is endless counting: each number is new.
"""

import re
import zlib
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from typing import Literal, NamedTuple

from opsin.core.answer import GuardVerdict

_BATCH = 8  # tokens between two readings

# Cycles. Copies alone make no runaway: a rule of 80 dashes, a row of zeros and a chorus sung three times are cycles
# too. So the cycle has to be long as a whole, and a long passage has to come more than twice. A passage of more than
# `most` comes back too rarely to be told from a quotation within a usual limit on tokens.
COPIES = 3
COPIES_OF_LONG = 4  # a record or a paragraph may well stand three times
_TRIES = 4


class _Cycle(NamedTuple):
    """`least` the whole cycle measures; a passage is long from `long` on. `probe` finds the place of a copy."""

    least: int
    long: int
    most: int
    probe: int


_OF_CHARACTERS = _Cycle(768, 320, 1024, 24)
_OF_TOKENS = _Cycle(192, 80, 256, 12)

# Compression: the same few things again, too irregular for a cycle and too odd for words. The last SPAN characters are
# packed every STRIDE tokens. A cycle with slips packs to 3 to 7 %. Legitimate text stays above 8 %: logs, counted
# verses and generated records, which differ in a number a line, and a long passage quoted word for word once more,
# since the span holds two copies at most of anything longer than half of it.
STRIDE = 64
SPAN = 2048
MAX_RATIO = 0.065

# Drift, nothing new: the last items of a list hold hardly a new word or number, and nearly all of them were named
# before. A number in an item makes it a new one: tables and logs live on that.
ITEMS = 28  # items in a window
ITEM_WORDS = 8  # a longer segment is no item, and ends the list
ITEMS_SAID = 0.88  # share of the items that must have been said before
ITEMS_NEWS = 2  # new words and numbers a window may hold
ITEM_KINDS = 6  # different items in a window: fewer are categories (yes and no, A to D), not a drifting list

# Drift, retelling: the last sentences are made of old sequences of words to a good part, they resemble earlier
# sentences in their telling words, some of them fully, and they come back in no order. "Some fully" leaves captions of
# similar images alone, which combine old words anew. "In no order" leaves alone what is repetitive by plan: in a song,
# a contract or a form the sentence that resembles this one stands a fixed number of sentences back.
RETOLD_WORDS = 70  # words in a window
RETOLD_SENTENCES = 7  # and sentences, at least
RETOLD_NEWS = 0.15  # new words a word, at most
RETOLD_SAID = 0.45  # share of the sequences said before, at least
RETOLD_KIN = 0.7  # resemblance to the nearest earlier sentence, on average, at least
RETOLD_SAME = 0.35  # share of the sentences that resemble an earlier one fully
RETOLD_ORDER = 0.6  # resemblance to the sentence a fixed number back, on average, at most
_LOOK_BACK = 32

# Segments. Up to GRAM words a segment is an item, and is either said before as a whole or not at all; a longer one is
# compared by its sequences of as many words.
GRAM = 4
LONG_LINE = 16  # from this item on a line of commas is a list; a shorter one is a sentence or a row of a table
_WRAPPED = 6  # words on a line, from which on it may go on in the next
_KNOWN = 32_768  # words and sequences remembered
_MAX_PENDING = 256
# A word, a number, or what may end a segment. A character is a word in scripts that are written without blanks.
_PIECE = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
    r"|[^\W\d_]+(?:['’\-_][^\W\d_]+)*"
    r"|\d+[.)](?=\s)"
    r"|\d+(?:[.,:]\d+)*"
    r"|[.!?](?=[\s\"'”)*])"
    r"|[。！？\n,;|、，；•·]"
    r"|[{}\[\]()<>=/\\$@&+~^%#`]|:(?=\w)"
    r"|[\-*](?=\s)"
)
_ITEM_ENDS = frozenset(",;|、，；•·")
_CODE = frozenset("{}[]()<>=/\\$@&+~^%#`:")  # a segment with one of these is no plain language
_BORDER = re.compile(r"[\s;|。！？、，；]|(?<!\d),")  # a comma behind a digit may be a number's


class Guard:
    """Watches one answer. It keeps a bounded amount of it and takes some microseconds a token; nothing raises.

    A repetition that was asked for is no runaway: a passage that `prompt` quotes may fill twice the space of as many
    copies as the largest number in the prompt says ("repeat the word hello 200 times").
    """

    def __init__(self, prompt: str = "") -> None:
        self._prompt = prompt
        self._count = 0
        self._characters = 0
        self._fresh_tokens: list[int] = []
        self._fresh: list[str] = []
        self._tokens = ""  # a character for each, so that both kinds of cycles are found in the same way
        self._text = ""
        self._squeezed = ""
        self._drift = Drift()

    def feed(self, token: int, text: str) -> GuardVerdict | None:
        """Take one token and the text it completed (empty while a character is incomplete).

        A verdict says why the answer should end here; `at_token` counts the tokens fed, this one included. The answer
        is read every `_BATCH` tokens.
        """
        self._fresh_tokens.append(token)
        self._fresh.append(text)
        if len(self._fresh) < _BATCH:
            return None
        fresh = "".join(self._fresh)
        self._count += _BATCH
        self._characters += len(fresh)
        self._tokens = _latest(self._tokens + "".join([chr(t & 0xFFFFF) for t in self._fresh_tokens]), _OF_TOKENS)
        self._text = _latest(self._text + fresh, _OF_CHARACTERS)
        self._squeezed = (self._squeezed + squeeze(fresh))[-SPAN:]
        self._fresh_tokens, self._fresh = [], []
        drifts = self._drift.read(fresh)
        reason: Literal["cycle", "drift", "compression"]
        if is_cycle(self._tokens, _OF_TOKENS):
            reason = "cycle"
        elif drifts:
            reason = "drift"
        elif is_cycle(self._text, _OF_CHARACTERS):
            reason = "cycle"
        elif self._count % STRIDE == 0 and packs_too_well(self._squeezed):
            reason = "compression"
        else:
            return None
        return None if self._is_asked_for() else GuardVerdict(reason, self._count)

    def _is_asked_for(self) -> bool:
        """Whether the prompt quotes the passage that comes again and again, and names more copies."""
        copies = max(map(int, re.findall(r"(?<!\d)\d{1,4}(?!\d)", self._prompt)), default=0)
        tail = self._text[-2 * _OF_CHARACTERS.most :].lower()
        periods = range(1, min(len(tail) // 2, self._characters))
        period = next((length for length in periods if tail[length:] == tail[:-length]), 0)
        if period == 0 or self._characters > 2 * copies * period:
            return False
        prompt = _words(self._prompt.lower())
        return any(_words(tail[-period - start : len(tail) - start]) in prompt for start in range(period))


def _words(text: str) -> str:
    return " ".join(["", *re.findall(r"[^\W_]+", text), ""])


def _latest(text: str, kind: _Cycle) -> str:
    """The end of a text, with room for the copies of the longest passage and more."""
    return text[-(COPIES_OF_LONG * kind.most + kind.most // 2) :]


def is_cycle(text: str, kind: _Cycle = _OF_CHARACTERS) -> bool:
    """Whether the text ends in one passage again and again.

    The end of the text is searched in what stands before it; each distance found is tried as a period. Few are tried:
    in a true cycle the nearest distance that holds for the whole probe is nearly always the period.
    """
    probe = text[-kind.probe :]
    end = len(text) - 1
    for _ in range(_TRIES):
        start = text.rfind(probe, max(0, len(text) - kind.most - kind.probe), end)
        if start < 0:
            return False
        period = len(text) - kind.probe - start
        span = max(kind.least, period * (COPIES if period <= kind.long else COPIES_OF_LONG))
        if span <= len(text) and text[-span:-period] == text[period - span :]:
            return True
        end = start + kind.probe - 1
    return False


def squeeze(text: str) -> str:
    """Blanks count once: deep indentation is no repetition."""
    return re.sub(r"\s+", " ", text)


def packs_too_well(text: str) -> bool:
    """Whether the end of a squeezed text packs to almost nothing."""
    latest = text[-SPAN:].encode("utf-8", "replace")
    return len(text) >= SPAN and len(zlib.compress(latest, 6)) <= MAX_RATIO * len(latest)


class Segment(NamedTuple):
    """One item, sentence or row, its words in lower case.

    `news` counts the words never used before in the answer (a number is a word), `said` is the share of the segment
    that was said before, 0 to 1, and `plain` means that it is language, not code or markup.
    """

    words: tuple[str, ...]
    news: int
    said: float
    plain: bool


class Segments:
    """Cuts streamed text, whose spans may end anywhere, into segments."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._pending = ""
        self._items: list[list[str]] = [[]]
        self._in_list = False
        self._news = 0
        self._plain = True
        self._wrapped = False
        self._on_line = 0

    def read(self, text: str) -> Iterator[Segment]:
        """Take more text; the segments it completes."""
        text = self._pending + text
        # What stands behind the last border may go on with a word, a number, or a mark that needs its neighbour.
        end = len(text) - len(_BORDER.split(text[-_MAX_PENDING:])[-1])
        self._pending = text[end:]
        for piece in _PIECE.findall(text, 0, end):
            if self._wrapped and not piece[0].islower():  # a line that goes on in lower case was only wrapped
                yield from self._end_line()
            self._wrapped = False
            if piece[0].isdigit() and piece[-1] in ".)":
                # "7." begins an item of a numbered list, and its number is no news; within a line it is a word.
                if self._items[0]:
                    self._add(piece[:-1])
                    if piece[-1] == ".":
                        yield from self._end_line()
            elif piece[0].isalnum():
                self._add(piece.lower())
            elif piece in _CODE:
                self._plain = False
            elif piece in _ITEM_ENDS:
                yield from self._end_item()
            elif piece == "\n" and self._on_line >= _WRAPPED and not self._in_list:
                self._wrapped = True
                self._on_line = 0
            else:
                yield from self._end_line()

    def _add(self, word: str) -> None:
        self._items[-1].append(word)
        self._on_line += 1
        self._news += not self._knows(hash(word))

    def _end_item(self) -> Iterator[Segment]:
        if self._in_list:
            yield from self._end_line()
            self._in_list = True
            return
        self._items.append([])
        if len(self._items) > LONG_LINE:
            # What was taken for a row is a list: its items are known one by one from here on.
            for item in self._items:
                self._said(item)
            self._items = [[]]
            self._in_list = True
            self._news = 0

    def _end_line(self) -> Iterator[Segment]:
        words = [word for item in self._items for word in item]
        if words:
            said = self._said(words)
            yield Segment(tuple(words), self._news, said if _tells(words) else 0.0, self._plain)
        elif not self._plain:
            yield Segment((), 0, 0.0, plain=False)
        self._items = [[]]
        self._news = self._on_line = 0
        self._in_list, self._plain = False, True

    def _said(self, words: list[str]) -> float:
        """Remember the sequences of a segment; the share of them that was known."""
        count = max(1, len(words) - GRAM + 1)
        return sum(self._knows(hash(tuple(words[i : i + GRAM]))) for i in range(count)) / count

    def _knows(self, value: int) -> bool:
        """Remember a value; True when it was known."""
        known = self._known
        if value in known:
            return True
        if len(known) >= _KNOWN:
            known.clear()
        known.add(value)
        return False


def _tells(words: list[str]) -> bool:
    """Whether saying it again says something: figures and single letters come again in every table."""
    if len(words) <= GRAM and any(word[0].isdigit() for word in words):
        return False
    return 2 * sum((len(word) > 2 and not word[0].isdigit()) or word[0] > "\u3000" for word in words) >= len(words)


class _Sentence:
    """`shorts` counts the short items before it; `earlier` has the telling words of earlier ones, the latest first."""

    def __init__(self, segment: Segment, shorts: int, earlier: deque[frozenset[str]]) -> None:
        self.segment = segment
        self.shorts = shorts
        self._earlier = tuple(earlier)
        self._telling = frozenset(w for w in segment.words if len(w) > 3 or w[0].isdigit() or w[0] > "\u3000")
        earlier.appendleft(self._telling)

    @cached_property
    def kin(self) -> list[float]:
        """`kin[p]` is the resemblance to the sentence p + 1 back: the share of telling words, 0 to 1."""
        mine = self._telling
        kin = [len(mine & other) / min(len(mine), len(other)) if mine and other else 0.0 for other in self._earlier]
        return kin + [0.0] * (_LOOK_BACK - len(kin))


class Drift:
    """An answer that goes on, never in the same order, but says nothing it has not said before.

    Code and markup say old things all the time: a segment with one of their marks empties both windows.
    """

    def __init__(self) -> None:
        self._segments = Segments()
        self._items: deque[Segment] = deque(maxlen=ITEMS)
        self._sentences: deque[_Sentence] = deque()
        self._earlier: deque[frozenset[str]] = deque(maxlen=_LOOK_BACK)
        self._shorts = 0

    def read(self, text: str) -> bool:
        """Take more text, cut anywhere; True when the answer drifts."""
        drifts = False
        for segment in self._segments.read(text):
            if not segment.plain:
                self._items.clear()
                self._sentences.clear()
                self._shorts = 0
                continue
            if len(segment.words) > ITEM_WORDS:
                self._items.clear()
            else:
                self._items.append(segment)
                drifts |= len(self._items) == ITEMS and self._nothing_new()
            if len(segment.words) <= GRAM:
                self._shorts += 1
            else:
                self._sentences.append(_Sentence(segment, self._shorts, self._earlier))
                self._shorts = 0
                drifts |= self._retold()
        return drifts

    def _nothing_new(self) -> bool:
        items = self._items
        return (
            sum(item.said for item in items) >= ITEMS_SAID * ITEMS
            and sum(item.news for item in items) <= ITEMS_NEWS
            and len({item.words for item in items}) >= ITEM_KINDS
        )

    def _retold(self) -> bool:
        window = self._sentences
        words = sum(len(sentence.segment.words) for sentence in window)
        while len(window) > RETOLD_SENTENCES and words - len(window[0].segment.words) >= RETOLD_WORDS:
            words -= len(window.popleft().segment.words)
        count = len(window)
        # Cheap questions first: only few texts come to the comparison of sentences.
        if words < RETOLD_WORDS or count < RETOLD_SENTENCES:
            return False
        if sum(s.segment.news for s in window) > RETOLD_NEWS * words:
            return False
        if sum(s.segment.said * len(s.segment.words) for s in window) < RETOLD_SAID * words:
            return False
        # Many short lines between: headings, verses, a form; no prose.
        if 2 * sum(s.shorts for s in window) > count:
            return False
        nearest = [max(s.kin) for s in window]
        if sum(nearest) < RETOLD_KIN * count or sum(kin == 1 for kin in nearest) < RETOLD_SAME * count:
            return False
        # A sentence said twice running is in order too: a verse may begin so.
        orders = (sum(max(s.kin[back], s.kin[0] == 1) for s in window) for back in range(_LOOK_BACK))
        return max(orders) <= RETOLD_ORDER * count
