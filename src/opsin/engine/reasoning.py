"""Keeps what a thinking model reasons apart from what it answers."""

from __future__ import annotations

import enum


class _At(enum.Enum):
    START = "nothing but white space so far"
    REASONING = "inside the block"
    GAP = "white space behind the block"
    ANSWER = "the answer"


class ReasoningSplitter:
    """Splits streamed text into reasoning and answer, wherever the tags are cut.

    One block, at the very beginning, is reasoning; a tag in the middle of an answer is text. With `starts_inside` the
    template opened the block already. White space right inside the tags and behind the block belongs to neither.
    """

    def __init__(self, opening: str, closing: str, *, starts_inside: bool = False) -> None:
        self._opening = opening
        self._closing = closing
        self._at = _At.REASONING if starts_inside else _At.START
        self._held = ""
        self._began = False

    @property
    def inside(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._at is _At.REASONING

    def feed(self, text: str) -> tuple[str, str]:
        """New reasoning and new answer."""
        self._held += text
        reasoning = answer = ""
        if self._at is _At.START:
            self._open()
        if self._at is _At.REASONING:
            reasoning = self._reason()
        if self._at is _At.GAP:
            self._held = self._held.lstrip()
            if self._held:
                self._at = _At.ANSWER
        if self._at is _At.ANSWER:
            answer, self._held = self._held, ""
        return reasoning, answer

    def finish(self) -> tuple[str, str]:
        """What was held back; an unfinished tag is text of where it stands."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self.inside else ("", held)

    def _open(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._opening):
            self._held = begun[len(self._opening) :]
            self._at = _At.REASONING
        elif not self._opening.startswith(begun):
            self._at = _At.ANSWER

    def _reason(self) -> str:
        """The reasoning that is sure; what may be the closing tag, and white space before it, waits."""
        if not self._began:
            self._held = self._held.lstrip()
            self._began = bool(self._held)
        before, tag, after = self._held.partition(self._closing)
        if tag:
            self._held = after
            self._at = _At.GAP
            return before.rstrip()
        keep = next(
            (
                n
                for n in range(min(len(before), len(self._closing) - 1), 0, -1)
                if self._closing.startswith(before[-n:])
            ),
            0,
        )
        sure = before[: len(before) - keep].rstrip()
        self._held = before[len(sure) :]
        return sure
