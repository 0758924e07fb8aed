"""Embeddings of pictures by content identity: in memory, least recently used first out, bounded in bytes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Embedding = NDArray[np.float32]


def salted(identity: str, salt: str) -> str:
    """The identity under which a picture is remembered: who has another salt cannot find out that it was seen."""
    return hashlib.sha256(f"{salt}\n{identity}".encode()).hexdigest() if salt else identity


class Store(Protocol):
    """A slower memory behind the fast one."""

    def get(self, identity: str) -> Embedding | None:
        """The embedding, float32 [n_tokens, n_embd]; None when it is not there or cannot be trusted."""
        ...

    def put(self, identity: str, embedding: Embedding) -> None:
        """Keep it, or fail to without harm."""
        ...

    def close(self) -> None:
        """Wait until all that was put is kept; twice does no harm."""
        ...


class PictureCache:
    """Used by the engine's thread alone. Embeddings are never changed after they were put in.

    `queries` and `hits` count looks at the whole cache; `disk_hits` those that the store behind it answered.
    """

    def __init__(self, max_bytes: int, store: Store | None = None) -> None:
        self._max_bytes = max_bytes
        self._store = store
        self._held: OrderedDict[str, Embedding] = OrderedDict()
        self.bytes = 0
        self.queries = self.hits = self.disk_hits = 0

    def get(self, identity: str) -> Embedding | None:
        """The embedding of a picture chunk, None when it must be encoded."""
        self.queries += 1
        embedding = self._held.get(identity)
        if embedding is None and self._store is not None:
            embedding = self._store.get(identity)
            if embedding is not None:
                self.disk_hits += 1
                self._keep(identity, embedding)
        if embedding is not None:
            self.hits += 1
            if identity in self._held:
                self._held.move_to_end(identity)
        return embedding

    def knows(self, identity: str) -> bool:
        """Whether it is in memory now; any thread may ask, and it may be gone a moment later."""
        return identity in self._held

    def put(self, identity: str, embedding: Embedding) -> None:
        """Remember a finished encode; a cancelled or failed one must never come here."""
        self._keep(identity, embedding)
        if self._store is not None:
            self._store.put(identity, embedding)

    def close(self) -> None:
        """Wait until all is written that goes to the store behind; the memory stays. Any thread, twice is no harm."""
        if self._store is not None:
            self._store.close()

    def _keep(self, identity: str, embedding: Embedding) -> None:
        old = self._held.pop(identity, None)
        if old is not None:
            self.bytes -= old.nbytes
        if embedding.nbytes > self._max_bytes:
            return
        embedding.flags.writeable = False
        self._held[identity] = embedding
        self.bytes += embedding.nbytes
        while self.bytes > self._max_bytes:
            _, oldest = self._held.popitem(last=False)
            self.bytes -= oldest.nbytes
