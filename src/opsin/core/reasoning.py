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
        return ReasoningSplitter(
            self.opening, self.closing, starts_inside=starts_inside, wrapper=self.wrapper, dropped=self.dropped
        )

    def split(self, text: str) -> tuple[str | None, str]:
        """A whole answer's thoughts (None where it has no block of them) and the rest."""
        if self.closing not in text:
            return None, text
        splitter = self.splitter(starts_inside=not text.lstrip().startswith(self.opening))
        thoughts, answer = splitter.feed(text)
        more, rest = splitter.finish()
        return thoughts + more, answer + rest


class ReasoningSplitter:
    """Takes an answer piece by piece and returns each piece as thoughts or as text; a tag may come in pieces.

    A block of thoughts counts only at the start of the answer: later tags are text. Space around the tags is dropped.
    What might be the beginning of a tag is held back until the next piece: at most a tag's length and the space before
    it.
    """

    def __init__(
        self,
        opening: str = "<think>",
        closing: str = "</think>",
        *,
        starts_inside: bool = False,
        wrapper: tuple[str, str] | None = None,
        dropped: tuple[str, ...] = (),
    ) -> None:
        self._opening, self._closing, self._wrapper = opening, closing, wrapper
        self._drop = dropped
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
        if self._state in {"before", "reopened"}:
            self._begin()
        thoughts = self._think() if self._state == "thoughts" else ""
        if self._state == "after":
            self._unwrap()
        return thoughts, self._tell() if self._state == "text" else ""

    def finish(self) -> tuple[str, str]:
        """What was held back, when the answer is over."""
        held, self._held = self._held, ""
        return (held.strip() if self._bare else held.rstrip(), "") if self.inside else ("", held)

    def _begin(self) -> None:
        shown = self._held.lstrip()
        if shown.startswith(self._opening):
            self._held = shown[len(self._opening) :]
            self._state = "thoughts"
        elif not self._opening.startswith(shown):
            self._state = "thoughts" if self._state == "reopened" else "after"
            self._bare = self._state == "thoughts"

    def _think(self) -> str:
        if self._bare:
            self._held = self._held.lstrip()
        end = self._held.find(self._closing)
        if end >= 0:
            thoughts, self._held = self._held[:end].rstrip(), self._held[end + len(self._closing) :]
            self._state, self._bare = "after", True
            return thoughts
        return self._release([self._closing], keep_space=True)

    def _unwrap(self) -> None:
        if self._bare:
            self._held = self._held.lstrip()
        shown = self._held.lstrip()
        if self._wrapper is not None:
            opening, closing = self._wrapper
            if shown.startswith(opening):
                self._held = shown[len(opening) :].lstrip()
                self._drop = (*self._drop, closing)
                self._bare = True
            elif opening.startswith(shown):
                return
        elif not self._held:
            return
        self._state = "text"

    def _tell(self) -> str:
        if self._bare:
            self._held = self._held.lstrip()
        closing = self._wrapper[1] if self._wrapper and self._wrapper[1] in self._drop else None
        if closing and closing in self._held:
            before, _, after = self._held.partition(closing)
            self._held = before.rstrip() + after
        for tag in self._drop:
            self._held = self._held.replace(tag, "")
        return self._release(self._drop, keep_space=closing is not None)

    def _release(self, tags: Iterable[str], *, keep_space: bool) -> str:
        """Give out what cannot be part of a tag, nor, with `keep_space`, space before one."""
        text, keep = self._held, 0
        for tag in tags:
            longest = min(len(tag) - 1, len(text))
            keep = max(keep, next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0))
        end = len(text) - keep
        if keep_space:
            end = len(text[:end].rstrip())
        given, self._held = text[:end], text[end:]
        if given:
            self._bare = False
        return given
