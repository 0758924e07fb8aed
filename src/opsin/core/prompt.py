"""A prompt in order: spans of text and images, ready to be tokenized."""

from __future__ import annotations

from dataclasses import dataclass

from opsin.core.image import Image
from opsin.core.reasoning import ReasoningStyle


@dataclass(frozen=True, slots=True)
class TextPart:
    """A span of text. With `special` the names of control tokens in it become those tokens, else they stay text."""

    text: str
    special: bool = True


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One image."""

    image: Image


Part = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the template made of the messages.

    `add_bos`: the tokenizer adds its begin token, which the template did not write. `thinking`: the prompt ends inside
    an open reasoning block, which `reasoning` marks (None: the model does not think). `stop` strings end the answer.
    """

    parts: tuple[Part, ...]
    add_bos: bool = True
    thinking: bool = False
    reasoning: ReasoningStyle | None = None
    stop: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Image, ...]:
        """The images, in order."""
        return tuple(part.image for part in self.parts if isinstance(part, ImagePart))
