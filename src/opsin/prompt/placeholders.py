"""Random placeholders for pictures and for control tokens in user text: put in before rendering, cut out afterwards.

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
from opsin.core.parts import Part, PicturePart, TextPart
from opsin.core.picture import Picture

_STEM_DIGITS = 32
_INDEX_DIGITS = 6
_CUT_APART = (
    "The model's chat template cuts texts apart, so that pictures cannot be placed: use another file of this model."
)


class ControlTokens:
    """Finds control tokens in a text, longest first. Built once per model; threads may share it."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # A token of spaces alone reads the same whether special or not, and templates trim it.
        self._tokens = frozenset(token for token in tokens if token.strip())
        self._lengths: dict[str, list[int]] = {}
        for length, first in sorted({(len(token), token[0]) for token in self._tokens}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        self._firsts = re.compile("[" + re.escape("".join(sorted(self._lengths))) + "]") if self._tokens else None

    def split(self, text: str) -> list[str]:
        """Pieces of the text, plain and token alternating, plain first; joined they are the text."""
        pieces: list[str] = []
        end = 0
        for match in self._firsts.finditer(text) if self._firsts else ():
            start = match.start()
            if start < end:
                continue
            for length in self._lengths[text[start]]:
                token = text[start : start + length]
                if token in self._tokens:
                    pieces += [text[end:start], token]
                    end = start + length
                    break
        pieces.append(text[end:])
        return pieces


class Placeholders:
    """The placeholders of one prompt."""

    def __init__(self, tokens: ControlTokens) -> None:
        self._stem = "".join(secrets.choice("123456789") for _ in range(_STEM_DIGITS))
        self._tokens = tokens
        self._originals: list[str | Picture] = []
        self._tokens_seen: dict[str, str] = {}

    def picture(self, picture: Picture) -> str:
        """A placeholder for a picture; asked for in the order of the conversation."""
        return self._new(picture)

    def protect(self, text: str) -> str:
        """The text with each control token in it replaced by a placeholder."""
        pieces = self._tokens.split(text)
        for index in range(1, len(pieces), 2):
            token = pieces[index]
            if token not in self._tokens_seen:
                self._tokens_seen[token] = self._new(token)
            pieces[index] = self._tokens_seen[token]
        return "".join(pieces)

    def protect_all(self, value: Any) -> Any:
        """The same for every text in a JSON value, keys too."""
        if isinstance(value, str):
            return self.protect(value)
        if isinstance(value, Mapping):
            return {self.protect_all(key): self.protect_all(each) for key, each in value.items()}
        if isinstance(value, Sequence):
            return [self.protect_all(each) for each in value]
        return value

    def cut(self, rendered: str) -> tuple[Part, ...]:
        """The parts: what the template wrote as special text, the users' control tokens as plain text, pictures.

        Raises BadPrompt when a picture is missing, doubled or out of order.
        """
        head, *pieces = rendered.split(self._stem)
        parts: list[Part] = []
        found: list[int] = []
        self._add_text(parts, head, special=True)
        for piece in pieces:
            index, rest = self._index(piece[:_INDEX_DIGITS]), piece[_INDEX_DIGITS:]
            original = self._originals[index]
            if isinstance(original, Picture):
                parts.append(PicturePart(original))
                found.append(index)
            else:
                self._add_text(parts, original, special=False)
            self._add_text(parts, rest, special=True)
        self._check(found)
        return tuple(parts)

    def _new(self, original: str | Picture) -> str:
        if len(self._originals) >= 10**_INDEX_DIGITS:
            raise BadPrompt(f"The conversation has more than {10**_INDEX_DIGITS:,} pictures and control tokens.")
        self._originals.append(original)
        return f"{self._stem}{len(self._originals) - 1:0{_INDEX_DIGITS}d}"

    def _index(self, digits: str) -> int:
        if len(digits) < _INDEX_DIGITS or not digits.isdecimal() or int(digits) >= len(self._originals):
            raise BadPrompt(_CUT_APART)
        return int(digits)

    def _add_text(self, parts: list[Part], text: str, *, special: bool) -> None:
        if special and self._stem[: _STEM_DIGITS // 2] in text:
            raise BadPrompt(_CUT_APART)
        if not text:
            return
        last = parts[-1] if parts else None
        if isinstance(last, TextPart) and last.special == special:
            parts[-1] = TextPart(last.text + text, special)
        else:
            parts.append(TextPart(text, special))

    def _check(self, found: list[int]) -> None:
        wanted = [index for index, original in enumerate(self._originals) if isinstance(original, Picture)]
        if found == wanted:
            return
        missing = [number for number, index in enumerate(wanted, 1) if index not in found]
        if missing:
            raise BadPrompt(
                f"The model's chat template leaves out picture {missing[0]} of {len(wanted)}: put pictures into a "
                "user's message."
            )
        raise BadPrompt("The model's chat template does not keep each picture once and in order: ask about one.")
