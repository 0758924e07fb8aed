"""Embeddings in memory: least recently used first out, bounded in bytes, with a slower memory behind."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.cache import EmbeddingCache
from opsin.core.request import Embedding


def rows(n: int, value: float = 1.0) -> Embedding:
    return np.full((n, 4), value, np.float32)  # 16 bytes a row


class Slow:
    """A store that is a dict."""

    def __init__(self) -> None:
        self.held: dict[str, Embedding] = {}
        self.asked = 0
        self.closed = 0

    def get(self, identity: str) -> Embedding | None:
        self.asked += 1
        return self.held.get(identity)

    def put(self, identity: str, embedding: Embedding) -> None:
        self.held[identity] = embedding

    def close(self) -> None:
        self.closed += 1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 6)), max_size=60))
def test_any_history_is_that_of_a_plain_lru(history: list[tuple[bool, int, int]]) -> None:
    cache, plain = EmbeddingCache(160), OrderedDict[str, Embedding]()
    for is_put, key, size in history:
        name = str(key)
        if is_put:
            cache.put(name, rows(size))
            plain.pop(name, None)
            plain[name] = rows(size)
            while sum(e.nbytes for e in plain.values()) > 160:
                plain.popitem(last=False)
        else:
            found = cache.get(name)
            assert (found is None) == (name not in plain)
            if found is not None:
                np.testing.assert_array_equal(found, plain[name])
                plain.move_to_end(name)
        assert cache.bytes == sum(e.nbytes for e in plain.values()) <= 160


def test_one_that_is_larger_than_the_whole_cache_is_not_kept_and_pushes_nobody_out() -> None:
    cache = EmbeddingCache(64)
    cache.put("small", rows(2))
    cache.put("large", rows(5))
    assert cache.get("large") is None
    assert cache.get("small") is not None
    cache.put("small", rows(5))
    assert cache.bytes == 0


def test_what_was_put_in_cannot_be_changed() -> None:
    cache = EmbeddingCache(64)
    cache.put("a", rows(1))
    found = cache.get("a")
    assert found is not None
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 2.0


def test_it_knows_what_is_in_memory_without_asking_the_store() -> None:
    store = Slow()
    cache = EmbeddingCache(32, store)
    cache.put("a", rows(2))
    cache.put("b", rows(2))
    assert (cache.in_memory("a") is None, cache.in_memory("b") is None, store.asked) == (True, False, 0)


def test_the_store_behind_answers_once_and_then_memory_does() -> None:
    store = Slow()
    store.held["a"] = rows(1)
    cache = EmbeddingCache(64, store)
    assert cache.get("a") is not None
    assert cache.get("a") is not None
    assert cache.get("b") is None
    assert store.asked == 2


def test_what_is_pushed_out_of_memory_comes_back_from_the_store() -> None:
    store = Slow()
    cache = EmbeddingCache(32, store)
    cache.put("a", rows(2, 1.0))
    cache.put("b", rows(2, 2.0))
    found = cache.get("a")
    assert found is not None
    assert found[0, 0] == 1.0
    assert store.asked == 1
    cache.close()
    assert store.closed == 1
    EmbeddingCache(32).close()
