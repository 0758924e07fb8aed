"""A model's thoughts apart from its answer: the tags around them."""

from __future__ import annotations

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
