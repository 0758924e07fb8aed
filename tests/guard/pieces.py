"""Cuts text into tokens as a byte-pair vocabulary does: no tokenizer is needed for tests of the guard.

Words carry the space before them, long words come in two or three pieces, digits come one by one, letters that form no
word come in threes, and runs of one punctuation mark or of blanks are merged. A Chinese character is a token. The same
word is always cut in the same way under one salt.
"""

from __future__ import annotations

import re
import zlib

PIECE = re.compile(r"[\u3040-\u9fff]| ?[^\W\d_]+|\d| {1,16}|\n|([^\w\s])\1{0,7}|.", re.DOTALL)


def pieces(text: str, salt: int = 0) -> list[tuple[int, str]]:
    """Tokens as (id, text); the texts join to `text`."""
    found = []
    for match in PIECE.finditer(text):
        found.extend(_cut(match.group(), salt))
    return [(zlib.crc32(piece.encode(), salt) % 32_000, piece) for piece in found]


def _cut(word: str, salt: int) -> list[str]:
    letters = len(word.strip())
    if letters > 14:
        return [word[i : i + 3] for i in range(0, len(word), 3)]
    if letters < 5 or not word.strip().isalpha():
        return [word]
    draw = zlib.crc32(word.encode(), salt + 1) % 100
    if letters > 8 and draw < 25:
        third = len(word) // 3
        return [word[:third], word[third : 2 * third], word[2 * third :]]
    if draw < (60 if letters > 8 else 35):
        middle = 2 + draw % (len(word) - 3)
        return [word[:middle], word[middle:]]
    return [word]


def words(text: str) -> list[str]:
    """The words of a text; shorter to write and to read than a list of them."""
    return text.split()
