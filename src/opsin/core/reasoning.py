"""A model's thoughts apart from its answer: the tags around them, and a splitter for text that streams."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningStyle:
    """The tags around a family's thoughts; `dropped` are tags in its answers that no reader wants to see."""

    opening: str = "<think>"
    closing: str = "</think>"
    dropped: tuple[str, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags that are removed from what a reader sees."""
        return (self.opening, self.closing, *self.dropped)

    def split(self, text: str) -> tuple[str | None, str]:
        """A whole answer's thoughts (None if it has no block of them) and the rest."""
        thoughts, closing, answer = text.partition(self.closing)
        if not closing:
            return None, text
        return thoughts.lstrip().removeprefix(self.opening).strip(), answer.lstrip()


class ReasoningSplitter:
    """Takes an answer piece by piece and returns each piece as thoughts or as text; a tag may come in pieces.

    Only a block at the start of the answer counts: later tags are text. Space around the tags is dropped. What might
    be the beginning of a tag, and space before the end of the thoughts, is held back until the next piece.
    `starts_inside`: the prompt opened the block. `inside`: what comes next is thoughts, as far as is known.
    """

    def __init__(self, style: ReasoningStyle, *, starts_inside: bool) -> None:
        self.inside = starts_inside
        self._style = style
        self._dropped = re.compile("|".join(map(re.escape, style.dropped)) or "(?!)")
        self._may_open = True
        self._bare = starts_inside  # only space was seen since the last tag: it is dropped
        self._held = ""

    def feed(self, delta: str) -> tuple[str, str]:
        """The new thoughts and the new text that are certain so far; either may be empty."""
        self._held += delta
        if self._may_open:
            self._open()
        thoughts = text = ""
        if self.inside and not self._may_open:
            thoughts = self._think()
        if not self.inside and not self._may_open:
            text = self._answer()
        return thoughts, text

    def finish(self) -> tuple[str, str]:
        """What was held back, when the answer is over."""
        held, self._held = self._shown(self._held), ""
        return (held.rstrip(), "") if self.inside else ("", held)

    def _open(self) -> None:
        """See whether the opening tag comes first, as soon as there is enough to tell."""
        start, opening = self._held.lstrip(), self._style.opening
        if start.startswith(opening):
            self._held = start.removeprefix(opening)
            self._may_open, self.inside, self._bare = False, True, True
        elif not opening.startswith(start):
            self._may_open = False

    def _think(self) -> str:
        closing = self._style.closing
        thoughts, found, rest = self._held.partition(closing)
        if not found:
            certain = thoughts[: len(thoughts) - overlap(thoughts, closing)].rstrip()
            self._held = thoughts[len(certain) :]
            return self._shown(certain)
        shown = self._shown(thoughts.rstrip())
        self._held, self.inside, self._bare = rest, False, True
        return shown

    def _answer(self) -> str:
        *certain, rest = self._dropped.split(self._held)
        end = len(rest) - max((overlap(rest, tag) for tag in self._style.dropped), default=0)
        self._held = rest[end:]
        return self._shown("".join(certain) + rest[:end])

    def _shown(self, text: str) -> str:
        if self._bare:
            text = text.lstrip()
            self._bare = not text
        return text


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `mark`."""
    start = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while start >= 0:
        if mark.startswith(text[start:]):
            return len(text) - start
        start = text.find(mark[0], start + 1)
    return 0
