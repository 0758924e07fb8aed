"""Image embeddings in memory, with the disk behind."""

from __future__ import annotations

import threading
from collections import OrderedDict

from opsin.cache.disk import DiskStore
from opsin.core.request import Embedding


def salted(identity: str, salt: str) -> str:
    """The identity under which an image is remembered: a client of another salt cannot find out that it was seen."""
    return f"{salt}\n{identity}" if salt else identity


class EmbeddingCache:
    """Image embeddings by identity, least recently used first out, with a store behind. Used by any thread.

    `max_bytes` bounds what is in memory. Embeddings are never changed after they were put in.
    """

    def __init__(self, max_bytes: int, store: DiskStore | None = None) -> None:
        self._max_bytes = max_bytes
        self._store = store
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Embedding] = OrderedDict()
        self.bytes = 0

    def get(self, identity: str) -> Embedding | None:
        """The embedding of an image chunk, None when it must be encoded. It may read the disk."""
        with self._lock:
            embedding = self._held.get(identity)
            if embedding is not None:
                self._held.move_to_end(identity)
        if embedding is None and self._store is not None:
            embedding = self._store.get(identity)
            if embedding is not None:
                self._keep(identity, embedding)
        return embedding

    def in_memory(self, identity: str) -> Embedding | None:
        """`get` without the disk, and without counting as a use."""
        with self._lock:
            return self._held.get(identity)

    def put(self, identity: str, embedding: Embedding) -> None:
        """Remember a finished encode; one that failed must never come here."""
        self._keep(identity, embedding)
        if self._store is not None:
            self._store.put(identity, embedding)

    def close(self) -> None:
        """Wait until the store has written everything; the memory stays. Closing twice does no harm."""
        if self._store is not None:
            self._store.close()

    def _keep(self, identity: str, embedding: Embedding) -> None:
        with self._lock:
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
