"""A prompt in order: spans of text and pictures, ready to be tokenized."""

from __future__ import annotations

from dataclasses import dataclass

from opsin.core.picture import Picture
from opsin.core.reasoning import ReasoningStyle


@dataclass(frozen=True, slots=True)
class TextPart:
    """A span of text between pictures.

    With `special` the names of control tokens in it become those tokens, as the template wrote them; without it they
    stay plain text, as a user wrote them.
    """

    text: str
    special: bool = True


@dataclass(frozen=True, slots=True)
class PicturePart:
    """One picture."""

    picture: Picture


Part = TextPart | PicturePart


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the template made of the messages.

    `add_bos` says whether the tokenizer adds its own begin token (False when the template wrote it). `thinking` is
    True when the prompt ends inside an open reasoning block, so that the answer starts with reasoning; `reasoning`
    says how such a block is marked, None for models that do not think. `stop` are strings that end the answer.
    """

    parts: tuple[Part, ...]
    add_bos: bool = True
    thinking: bool = False
    reasoning: ReasoningStyle | None = None
    stop: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures, in order."""
        return tuple(part.picture for part in self.parts if isinstance(part, PicturePart))
