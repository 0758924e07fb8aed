"""Random placeholders for images and for control tokens in user text: put in before rendering, cut out afterwards.

A placeholder is a run of decimal digits: nothing a template does to text (trim, upper case, JSON) changes it, and
nobody who writes a message can guess it. So a marker in user text stays text, and a control token in it never reaches
the tokenizer as one, wherever the template moved or trimmed the text around it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opsin.core.errors import BadPrompt
from opsin.core.request import Image, ImagePart, Part, TextPart

_STEM_DIGITS = 32
_INDEX_DIGITS = 6
_CUT_APART = (
    "The model's chat template cuts texts apart, so that images cannot be placed: use another file of this model."
)


class ControlTokens:
    """Finds control tokens in a text, longest first. Built once per model; threads may share it."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # A token of spaces alone reads the same whether special or not, and templates trim it.
        self._tokens = frozenset(token for token in tokens if token.strip())
        self._lengths: dict[str, list[int]] = {}
        for length, first in sorted({(len(token), token[0]) for token in self._tokens}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        self._firsts = re.compile("[" + re.escape("".join(self._lengths)) + "]") if self._tokens else None

    def split(self, text: str) -> list[str]:
        """Pieces of the text, plain and token alternating, plain first; joined they are the text."""
        pieces, end = [], 0
        for match in self._firsts.finditer(text) if self._firsts else ():
            start = match.start()
            candidates = (text[start : start + length] for length in self._lengths[match[0]])
            token = next((token for token in candidates if token in self._tokens), "")
            if token and start >= end:
                pieces += [text[end:start], token]
                end = start + len(token)
        return [*pieces, text[end:]]


class Placeholders:
    """The placeholders of one prompt."""

    def __init__(self, tokens: ControlTokens) -> None:
        self._stem = "".join(secrets.choice("123456789") for _ in range(_STEM_DIGITS))
        self._tokens = tokens
        self._originals: list[str | Image] = []
        self._tokens_seen: dict[str, str] = {}

    def place(self, original: str | Image) -> str:
        """A new placeholder; images must come in the order of the conversation."""
        if len(self._originals) >= 10**_INDEX_DIGITS:
            raise BadPrompt(f"The conversation has more than {10**_INDEX_DIGITS:,} images and control tokens.")
        self._originals.append(original)
        return f"{self._stem}{len(self._originals) - 1:0{_INDEX_DIGITS}d}"

    def protect(self, value: Any) -> Any:
        """A text, or a JSON value of texts (keys too), with each control token replaced by a placeholder."""
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(each) for key, each in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [self.protect(each) for each in value]
        if not isinstance(value, str):
            return value
        pieces = self._tokens.split(value)
        for token in pieces[1::2]:
            if token not in self._tokens_seen:
                self._tokens_seen[token] = self.place(token)
        return "".join(self._tokens_seen.get(piece, piece) if at % 2 else piece for at, piece in enumerate(pieces))

    def cut(self, rendered: str) -> tuple[Part, ...]:
        """The parts: what the template wrote as special text, the users' control tokens as plain text, images.

        Raises BadPrompt when an image is missing, doubled or out of order.
        """
        parts: list[Part] = []
        found: list[int] = []
        for at, piece in enumerate(re.split(f"{self._stem}([0-9]{{{_INDEX_DIGITS}}})", rendered)):
            if at % 2 == 0:
                if self._stem[: _STEM_DIGITS // 2] in piece:
                    raise BadPrompt(_CUT_APART)
                _add_text(parts, piece, special=True)
                continue
            if int(piece) >= len(self._originals):
                raise BadPrompt(_CUT_APART)
            original = self._originals[int(piece)]
            if isinstance(original, str):
                _add_text(parts, original, special=False)
            else:
                parts.append(ImagePart(original))
                found.append(int(piece))
        wanted = [index for index, original in enumerate(self._originals) if isinstance(original, Image)]
        for number, index in enumerate(wanted, 1):
            if index not in found:
                raise BadPrompt(
                    f"The model's chat template leaves out image {number} of {len(wanted)}: put images into a "
                    "user's message."
                )
        if found != wanted:
            raise BadPrompt("The model's chat template does not keep each image once and in order: ask about one.")
        return tuple(parts)


def _add_text(parts: list[Part], text: str, *, special: bool) -> None:
    """Append a text, joined with the one before it if that is of the same kind."""
    if text and parts and isinstance(parts[-1], TextPart) and parts[-1].special == special:
        parts[-1] = TextPart(parts[-1].text + text, special)
    elif text:
        parts.append(TextPart(text, special))
