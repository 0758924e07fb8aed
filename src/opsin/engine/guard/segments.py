"""An answer cut into what it says one after another: items of a list, sentences, rows; with how new each one is."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Up to this many words a segment is an item, and is either said before as a whole or not at all; a longer one is
# compared by its sequences of as many words.
GRAM = 4
# From this item on a line of commas is a list; a shorter one is a sentence or a row of a table.
LONG_LINE = 16

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
# Marks of code and markup: a segment with one of them is no plain language.
_CODE = frozenset("{}[]()<>=/\\$@&+~^%#`:")
_WRAPPED = 6  # words on a line, from which on it may go on in the next
_GENERATION = 8192
_MAX_PENDING = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """One item, sentence or row, its words in lower case.

    `news` counts the words never used before in the answer (a number is a word), `said` is the share of the segment
    that was said before, 0 to 1, and `plain` means that it is language, not code or markup.
    """

    words: tuple[str, ...]
    news: int
    said: float
    plain: bool


class _Memory:
    """A bounded set of hashes: what was added longest ago is forgotten."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._older: set[int] = set()

    def add(self, value: int) -> bool:
        """Remember a value; True when it was known."""
        if value in self._recent:
            return True
        if len(self._recent) >= _GENERATION:
            self._older, self._recent = self._recent, set()
        self._recent.add(value)
        return value in self._older


class Segments:
    """Cuts streamed text, whose spans may end anywhere, into segments."""

    def __init__(self) -> None:
        self._words = _Memory()
        self._grams = _Memory()
        self._pending = ""
        self._items: list[list[str]] = [[]]
        self._in_list = False
        self._news = 0
        self._plain = True
        self._wrapped = False
        self._on_line = 0

    def read(self, text: str) -> list[Segment]:
        """Take more text; the segments it completes."""
        text = self._pending + text
        end = _settled(text)
        self._pending = text[end:]
        done: list[Segment] = []
        for piece in _PIECE.findall(text, 0, end):
            self._unwrap(piece, done)
            if piece[0].isdigit() and piece[-1] in ".)":
                # "7." begins an item of a numbered list, and its number is no news; within a line it is a word.
                if self._items[0]:
                    self._word(piece[:-1])
                    if piece[-1] == ".":
                        self._end_line(done)
            elif piece[0].isalnum():
                self._word(piece.lower())
            elif piece in _CODE:
                self._plain = False
            elif piece in _ITEM_ENDS:
                self._end_item(done)
            elif piece == "\n" and self._on_line >= _WRAPPED and not self._in_list:
                self._wrapped = True
                self._on_line = 0
            else:
                self._end_line(done)
        return done

    def _unwrap(self, piece: str, done: list[Segment]) -> None:
        """A line that goes on in lower case was only wrapped; else it ended where it ended."""
        if self._wrapped:
            self._wrapped = False
            if not piece[0].islower():
                self._end_line(done)

    def _word(self, word: str) -> None:
        self._items[-1].append(word)
        self._on_line += 1
        if not self._words.add(hash(word)):
            self._news += 1

    def _end_item(self, done: list[Segment]) -> None:
        if self._in_list:
            self._close(self._items[-1], done)
            self._items = [[]]
            return
        self._items.append([])
        if len(self._items) > LONG_LINE:
            # What was taken for a row is a list: its items are known one by one from here on.
            for item in self._items:
                self._recognise(item)
            self._items = [[]]
            self._in_list = True
            self._news = 0

    def _end_line(self, done: list[Segment]) -> None:
        self._close([word for item in self._items for word in item], done)
        self._items = [[]]
        self._in_list = False

    def _close(self, words: list[str], done: list[Segment]) -> None:
        if words:
            said = self._recognise(words)
            if not _tells(words):
                said = 0.0
            done.append(Segment(tuple(words), self._news, said, self._plain))
        elif not self._plain:
            done.append(Segment((), 0, 0.0, plain=False))
        self._news = self._on_line = 0
        self._plain = True

    def _recognise(self, words: list[str]) -> float:
        """Remember the sequences of a segment; the share of them that was known."""
        count = max(1, len(words) - GRAM + 1)
        return sum(self._grams.add(hash(tuple(words[i : i + GRAM]))) for i in range(count)) / count


def _tells(words: list[str]) -> bool:
    """Whether saying it again says something: figures and single letters come again in every table."""
    if len(words) <= GRAM and any(word[0].isdigit() for word in words):
        return False
    telling = sum(1 for word in words if (len(word) > 2 and not word[0].isdigit()) or word[0] > "\u3000")
    return 2 * telling >= len(words)


def _settled(text: str) -> int:
    """Up to where the text can be cut into pieces: what comes later may go on with a word, a number, or a mark."""
    end = len(text)
    while end:
        char = text[end - 1]
        if char.isspace():
            return end
        joins = char.isalnum() or char in "_'’-"
        end -= 1
        if not joins and not (char in ".,:" and end and text[end - 1].isdigit()):
            # A mark may need its right neighbour to be understood, so it waits too.
            break
    return end if len(text) - end <= _MAX_PENDING else len(text)
