"""Invented vocabularies: SentencePiece-like (llama.cpp's SPM) and GPT-2-like (BPE)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsin.core.errors import BadParameter

if TYPE_CHECKING:
    from collections.abc import Iterator

SPACE = "\u2581"  # SentencePiece's visible blank
BPE_SPACE = "\u0120"  # GPT-2's, as is its line break
_BPE_NEWLINE = "\u010a"
_LETTERS = "etaoinsrhldcumfpgwybvkxjqz"

# llama.cpp's `llama_token_type`
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Texts and llama.cpp's token types, equally many.

    SPM: as many `scores`; token 0 is unknown, 1 begins and 2 ends a text. BPE: `merges`, most frequent first. Further
    control tokens are at the end.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()


SMALLEST = 3 + 256 + 95


def make_vocabulary(size: int, control: tuple[str, ...] = ()) -> Vocabulary:
    """Three control tokens, 256 bytes, the printable ASCII characters, words, then the tokens of `control`: `size`.

    Every word joins two earlier tokens and scores below them, so SPM's merging can reach it from single characters. The
    same size gives the same words. Raises BadParameter if `size` is below `SMALLEST` plus the tokens of `control`.
    """
    if size < SMALLEST + len(control):
        raise BadParameter(f"a vocabulary needs at least {SMALLEST + len(control)} tokens, {size} are too few")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), SPACE]
    tokens += [chr(code) for code in range(33, 127)]
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256 + [_NORMAL] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-1e6] * (len(tokens) - 259)
    words = [a + b for a, b in itertools.islice(_joins(SPACE), size - len(tokens) - len(control))]
    return Vocabulary(
        tokens=(*tokens, *words, *control),
        scores=(*scores, *(-float(rank) for rank in range(len(words))), *[0.0] * len(control)),
        types=(*types, *[_NORMAL] * len(words), *[_CONTROL] * len(control)),
    )


def make_bpe_vocabulary(size: int, control: tuple[str, ...]) -> Vocabulary:
    """256 bytes as GPT-2 writes them, words with the merges that make them, then the tokens of `control`: `size`.

    The first word is two line breaks, which SmolVLM writes in front of an image.

    Raises BadParameter if the bytes do not fit.
    """
    bytes_ = _bytes_as_characters()
    if size < len(bytes_) + len(control):
        raise BadParameter(f"a vocabulary needs at least {len(bytes_) + len(control)} tokens, {size} are too few")
    every = itertools.chain([(_BPE_NEWLINE, _BPE_NEWLINE)], _joins(BPE_SPACE))
    joins = list(itertools.islice(every, size - len(bytes_) - len(control)))
    return Vocabulary(
        tokens=(*bytes_, *(a + b for a, b in joins), *control),
        types=(*[_NORMAL] * (size - len(control)), *[_CONTROL] * len(control)),
        merges=tuple(f"{a} {b}" for a, b in joins),
    )


def _bytes_as_characters() -> tuple[str, ...]:
    """One visible character per byte: Latin-1's if it is printable, else one from 256 on (GPT-2's table)."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = itertools.count(256)
    return tuple(chr(value if value in shown else next(spare)) for value in range(256))


def _joins(space: str) -> Iterator[tuple[str, str]]:
    """Endless distinct words as (left, right): pairs of letters first, then longer and longer joins of those."""
    import random

    pairs = list(itertools.product(space + _LETTERS, _LETTERS))
    yield from pairs
    known = [a + b for a, b in pairs]
    rng = random.Random(20)  # noqa: S311  # made-up words, no secrets
    seen = set(known)
    while True:
        right = rng.choice(known)
        left = rng.choice(known)
        word = left + right
        # Few joins are short and new once there are many words.
        if not right.startswith(space) and len(word) <= (12 if len(known) < 40_000 else 24) and word not in seen:
            seen.add(word)
            known.append(word)
            yield left, right
