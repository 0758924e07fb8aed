"""A model's thoughts apart from its answer: the tags around them, and a splitter for text that streams."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningStyle:
    """The tags around a family's thoughts.

    `wrapper` is a pair of tags around the answer that follows, `dropped` are tags within it; readers want none of them.
    """

    opening: str = "<think>"
    closing: str = "</think>"
    wrapper: tuple[str, str] | None = None
    dropped: tuple[str, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags that are removed from what a reader sees."""
        return (self.opening, self.closing, *(self.wrapper or ()), *self.dropped)

    def splitter(self, *, starts_inside: bool) -> ReasoningSplitter:
        """A splitter for one answer; `starts_inside` when the prompt opened the block."""
        return ReasoningSplitter(self, starts_inside=starts_inside)

    def split(self, text: str) -> tuple[str | None, str]:
        """A whole answer's thoughts (None if it has no block of them) and the rest."""
        if self.closing not in text:
            return None, text
        splitter = self.splitter(starts_inside=not text.lstrip().startswith(self.opening))
        thoughts, answer = splitter.feed(text)
        more, rest = splitter.finish()
        return thoughts + more, answer + rest


class ReasoningSplitter:
    """Takes an answer piece by piece and returns each piece as thoughts or as text; a tag may come in pieces.

    Only a block at the start of the answer counts: later tags are text. Space around the tags is dropped. What might
    be the beginning of a tag, and the space before it, is held back until the next piece.
    """

    def __init__(self, style: ReasoningStyle = ReasoningStyle(), *, starts_inside: bool = False) -> None:
        self._style = style
        self._dropped = style.dropped
        self._unwrapped = False  # the answer's wrapper is open, so its closing tag is dropped, and the space before it
        self._state = "reopened" if starts_inside else "before"
        self._held = ""
        self._bare = True  # only space was seen in this state, so it is dropped

    @property
    def inside(self) -> bool:
        """Whether what comes next belongs to the thoughts, as far as is known."""
        return self._state in {"reopened", "thoughts"}

    def feed(self, delta: str) -> tuple[str, str]:
        """The new thoughts and the new text that are certain so far; either may be empty."""
        self._held += delta
        thoughts = text = ""
        if self._state in {"before", "reopened"}:
            self._open()
        if self._state == "thoughts":
            thoughts = self._think()
        if self._state == "after":
            self._unwrap()
        if self._state == "text":
            text = self._answer()
        return thoughts, text

    def finish(self) -> tuple[str, str]:
        """What was held back, when the answer is over."""
        held, self._held = self._held, ""
        return (held.strip() if self._bare else held.rstrip(), "") if self.inside else ("", held)

    def _open(self) -> None:
        shown, opening = self._held.lstrip(), self._style.opening
        if shown.startswith(opening):
            self._held, self._state = shown[len(opening) :], "thoughts"
        elif not opening.startswith(shown):
            self._bare = self._state == "reopened"
            self._state = "thoughts" if self._bare else "after"

    def _think(self) -> str:
        self._drop_space()
        thoughts, closing, rest = self._held.partition(self._style.closing)
        if not closing:
            return self._release([self._style.closing], keep_space=True)
        self._held, self._state, self._bare = rest, "after", True
        return thoughts.rstrip()

    def _unwrap(self) -> None:
        self._drop_space()
        opening = self._style.wrapper[0] if self._style.wrapper else ""
        shown = self._held.lstrip()
        if opening and shown.startswith(opening):
            self._held, self._state = shown[len(opening) :], "text"
            self._unwrapped = self._bare = True
        elif not opening or not opening.startswith(shown):
            self._state = "text"

    def _answer(self) -> str:
        for tag in self._dropped:
            self._held = self._held.replace(tag, "")
        self._drop_space()
        if not (self._unwrapped and self._style.wrapper):
            return self._release(self._dropped, keep_space=False)
        closing = self._style.wrapper[1]
        before, found, after = self._held.partition(closing)
        if not found:
            return self._release((*self._dropped, closing), keep_space=True)
        self._held, self._unwrapped, self._dropped = after, False, (*self._dropped, closing)
        before = before.rstrip()
        self._bare = self._bare and not before
        return before + self._answer()

    def _drop_space(self) -> None:
        if self._bare:
            self._held = self._held.lstrip()

    def _release(self, tags: Iterable[str], *, keep_space: bool) -> str:
        """Give out what cannot be part of a tag, nor, with `keep_space`, space before one."""
        text = self._held
        starts = (tag[:length] for tag in tags for length in range(1, len(tag)))
        end = len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)
        if keep_space:
            end = len(text[:end].rstrip())
        given, self._held = text[:end], text[end:]
        self._bare = self._bare and not given
        return given
