"""Candidates as the native samplers take them, and which of them need not be looked at."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.intp]
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_HEADS = 1024
_LEAST = np.finfo(np.float32).min


class Candidates:
    """Room for a model's whole vocabulary, which native samplers work on; for the thread that samples."""

    def __init__(self, llama: Any, n_vocab: int) -> None:
        self._apply = llama.llama_sampler_apply
        memory = (llama.llama_token_data * n_vocab)()
        self._rows, self._first = np.frombuffer(memory, _CANDIDATE), memory[0]
        self._array = llama.llama_token_data_array(memory, 0, -1, False)
        self._reference = ctypes.byref(self._array)

    def _run(self, sampler: int, ids: Ids, logits: Any) -> None:
        array, rows = self._array, self._rows[: len(ids)]
        rows["id"], rows["logit"] = ids, logits
        array.size, array.selected, array.sorted = len(ids), -1, False
        self._apply(sampler, self._reference)

    def draw(self, chain: int, ids: Ids, logits: NDArray[np.float32]) -> int:
        """The token that a chain of samplers draws among `ids`, which have these logits."""
        self._run(chain, ids, logits)
        return int(self._rows["id"][self._array.selected])

    def permits(self, grammar: int, token: int) -> bool:
        """Whether a grammar permits this token next."""
        self._first.id, self._first.logit, self._array.size = token, 1.0, 1
        self._apply(grammar, self._reference)
        return bool(self._first.logit > 0)

    def permitted(self, grammar: int, ids: Ids) -> NDArray[np.bool_]:
        """Which of `ids` a grammar permits next."""
        self._run(grammar, ids, 1.0)
        return self._rows["logit"][: len(ids)] > 0


def best(scores: NDArray[np.float32], count: int) -> Ids:
    """The `count` tokens of highest score, and those that score like or nearly like the last of them.

    Best first, of equal ones the lower id; all that are left out score less. Those of -inf are left out.
    """
    heads = scores
    if len(scores) >= 2 * _HEADS >= 4 * count:
        # Each column's best: `count` of them are no better than the `count` best of all.
        heads = scores[: len(scores) // _HEADS * _HEADS].reshape(-1, _HEADS).max(axis=0)
    least = np.partition(heads, -count)[-count] if count < len(heads) else _LEAST
    ids = np.flatnonzero(scores >= max(least, _LEAST))
    return ids[np.argsort(-scores[ids], kind="stable")]


class PrefixTree:
    """Which tokens begin like which others: where a grammar refuses the beginning, it refuses the whole.

    Only text in whole characters counts as a beginning: a grammar's negated classes may refuse the first bytes of a
    character that they permit. Pieces that are empty are nobody's beginning.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        parents, depths = np.zeros(len(pieces), np.intp), np.zeros(len(pieces), np.intp)
        path: list[int] = []
        for token in sorted((token for token, piece in enumerate(pieces) if _is_text(piece)), key=pieces.__getitem__):
            while path and not pieces[token].startswith(pieces[path[-1]]):
                path.pop()
            if path:
                parents[token], depths[token] = path[-1], len(path)
            path.append(token)
        levels = (np.flatnonzero(depths == depth) for depth in range(depths.max(initial=0) + 1))
        self._levels = [(ids, parents[ids]) for ids in levels]

    def permitted(self, candidates: Candidates, grammar: int) -> NDArray[np.bool_]:
        """What a grammar says of every token, without asking about those whose beginning it refuses."""
        (first, _), *rest = self._levels
        found = np.zeros(sum(len(ids) for ids, _ in self._levels), np.bool_)
        found[first] = candidates.permitted(grammar, first)
        for ids, parents in rest:
            left = ids[found[parents]]
            found[left] = candidates.permitted(grammar, left)
        return found


def _is_text(piece: bytes) -> bool:
    try:
        return bool(piece.decode())
    except UnicodeDecodeError:
        return False
