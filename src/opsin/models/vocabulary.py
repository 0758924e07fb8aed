"""A vocabulary made up for random-weight models, in the SentencePiece manner llama.cpp calls SPM."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsin.core.errors import BadParameter

if TYPE_CHECKING:
    from collections.abc import Iterator

SPACE = "\u2581"  # SentencePiece's visible blank
_LETTERS = SPACE + "etaoinsrhldcumfpgwybvkxjqz"

# llama.cpp's `llama_token_type`
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Texts, scores and llama.cpp's token types, all of one length; 0 is unknown, 1 begins and 2 ends a text."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]


SMALLEST = 3 + 256 + 95


def make_vocabulary(size: int) -> Vocabulary:
    """Three control tokens, 256 bytes, the printable ASCII characters, then words up to `size`.

    Every word joins two tokens that stand before it and scores below them, so that SPM's merging can reach it from
    single characters. The same size gives the same words. Raises BadParameter under `SMALLEST`.
    """
    if size < SMALLEST:
        raise BadParameter(f"a vocabulary needs at least {SMALLEST} tokens, {size} are too few")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), SPACE]
    tokens += [chr(code) for code in range(33, 127)]
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256 + [_NORMAL] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-1e6] * (len(tokens) - 259)
    words = list(itertools.islice(_words(), size - len(tokens)))
    return Vocabulary(
        tokens=tuple(tokens + words),
        scores=tuple(scores + [-float(rank) for rank in range(len(words))]),
        types=tuple(types + [_NORMAL] * len(words)),
    )


def _words() -> Iterator[str]:
    """Distinct words without end: pairs of letters first, then longer and longer joins of what is known."""
    import random

    known = [a + b for a, b in itertools.product(_LETTERS, _LETTERS[1:])]
    yield from known
    draw = random.Random(20)  # noqa: S311  # made-up words, no secrets
    seen = set(known)
    while True:
        right = draw.choice(known)
        word = draw.choice(known) + right
        if not right.startswith(SPACE) and len(word) <= 12 and word not in seen:
            seen.add(word)
            known.append(word)
            yield word
