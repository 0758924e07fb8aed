"""The best of a vocabulary, and which of its tokens a grammar need not be asked about."""

import itertools
from typing import Any

import numpy as np
import pytest

from opsin.native.candidates import PrefixTree, best


@pytest.mark.parametrize("count", [1, 2, 41, 256, 600])
@pytest.mark.parametrize("n", [5, 512, 2048, 5000, 32_000])
@pytest.mark.parametrize("decimals", [0, 2, 7])
def test_the_best_are_all_that_score_so_high_in_the_order_of_a_stable_sort(n: int, count: int, decimals: int) -> None:
    scores = np.round(np.random.default_rng(n).standard_normal(n) * 3, decimals).astype(np.float32)
    scores[:: max(7, n // 50)] = -np.inf
    order = [token for token in np.argsort(-scores, kind="stable") if scores[token] > -np.inf]
    found = best(scores, count)
    assert len(found) >= min(count, len(order))
    assert list(found) == order[: len(found)]
    left = order[len(found) :]
    assert not left or scores[left[0]] < scores[found[-1]]


class Asked:
    """Stands in for the native samplers: permits what one of these texts begins with, but no part of a character."""

    def __init__(self, pieces: list[bytes], texts: tuple[str, ...]) -> None:
        self.pieces, self.texts, self.count = [piece.decode(errors="replace") for piece in pieces], texts, 0

    def permitted(self, grammar: int, ids: Any) -> Any:
        self.count += len(ids)
        begins = [any(text.startswith(self.pieces[i]) for text in self.texts) for i in ids]
        return np.array(begins, np.bool_) & (ids > 0)  # the first is a control token, which has no text


def test_a_tree_says_what_asking_about_each_would_and_asks_less() -> None:
    words = ["".join(letters) for size in (1, 2, 3) for letters in itertools.product("abcdefgé", repeat=size)]
    pieces = [b"", b"\xc3", b"\xa9b", *(word.encode() for word in words), b"ab"]
    asked = Asked(pieces, ("abc", "éa"))
    found = PrefixTree(pieces).permitted(asked, 1)  # type: ignore[arg-type]
    count, asked.count = asked.count, 0
    assert list(found) == list(asked.permitted(1, np.arange(len(pieces))))
    assert sorted(pieces[i].decode() for i in np.flatnonzero(found)) == ["a", "ab", "ab", "abc", "é", "éa"]
    assert count < asked.count / 10
