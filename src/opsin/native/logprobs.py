"""Natural log probabilities of raw logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from opsin.core.answer import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def token_logprob(logits: NDArray[np.float32], token: int, top: int, piece: Callable[[int], bytes]) -> TokenLogprob:
    """The log probability of `token`, and the `top` most likely tokens, best first, ties by token id.

    `logits` is float32 [n_vocab]. The sum is taken in float64: with 150,000 terms float32 loses the fourth digit.
    """
    peak = float(logits.max())
    norm = peak + float(np.log(np.exp(logits.astype(np.float64) - peak).sum()))
    best: tuple[tuple[int, bytes, float], ...] = ()
    if top > 0:
        top = min(top, len(logits))
        chosen = np.argpartition(logits, -top)[-top:]
        order = chosen[np.lexsort((chosen, -logits[chosen]))]
        best = tuple((int(one), piece(int(one)), float(logits[one]) - norm) for one in order)
    return TokenLogprob(token, piece(token), float(logits[token]) - norm, best)
