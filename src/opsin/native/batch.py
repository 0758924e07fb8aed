"""Arrays of one ubatch, made once and filled again for every decode.

`llama_batch` is a struct of bare pointers: the arrays must live as long as the call that reads them. Under M-RoPE an
embedding has four positions, section after section, for which `llama_batch_init` has no room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from opsin.core.backend import EmbeddingRows, TokenBatch


class BatchArrays:
    """Room for `capacity` rows with `n_pos` positions each (1, or 4 under M-RoPE).

    Every row belongs to its sequence, and with a `keeper` offset also to the sequence that many ids further on.
    """

    def __init__(self, batch_type: Any, capacity: int, n_pos: int, keeper: int = 0) -> None:
        self.capacity = capacity
        self.n_pos = n_pos
        # Added to a row's sequence: its ids. llama.cpp masks by any one of them: both hold the same cells.
        self._ids = np.array([0, keeper] if keeper else [0], np.int32)
        self._token = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity * n_pos, np.int32)
        self._n_seq_id = np.full(capacity, len(self._ids), np.int32)
        self._seq_id = np.zeros((capacity, len(self._ids)), np.int32)
        self._logits = np.zeros(capacity, np.int8)
        # A row's list of ids is one row of _seq_id.
        self._seq_ids = self._seq_id.ctypes.data + self._seq_id.strides[0] * np.arange(capacity, dtype=np.uintp)
        self._types = dict(batch_type._fields_)
        self._batch = batch_type()
        self._batch.pos = self._pointer(self._pos, "pos")
        self._batch.n_seq_id = self._pointer(self._n_seq_id, "n_seq_id")
        self._batch.seq_id = self._pointer(self._seq_ids, "seq_id")
        self._batch.logits = self._pointer(self._logits, "logits")
        self._tokens = self._pointer(self._token, "token")

    def _pointer(self, array: np.ndarray[Any, Any], field: str) -> Any:
        return array.ctypes.data_as(self._types[field])

    def tokens(self, batch: TokenBatch) -> Any:
        """A `llama_batch` of tokens, valid until the next call."""
        count = len(batch.tokens)
        self._token[:count] = batch.tokens
        self._pos[:count] = batch.positions
        self._seq_id[:count] = np.array(batch.seq_ids, np.int32)[:, np.newaxis] + self._ids
        self._logits[:count] = 0
        self._logits[batch.outputs] = 1
        self._batch.n_tokens, self._batch.token, self._batch.embd = count, self._tokens, None
        return self._batch

    def embeddings(self, rows: EmbeddingRows) -> Any:
        """A `llama_batch` of embeddings, valid until the next call and while `rows` is alive."""
        count = len(rows.rows)
        self._pos[: count * self.n_pos] = rows.positions.reshape(-1)
        self._seq_id[:count] = rows.seq_id + self._ids
        self._logits[:count] = 0
        self._logits[count - 1] = rows.logits
        embeddings = self._pointer(rows.rows, "embd")
        self._batch.n_tokens, self._batch.token, self._batch.embd = count, None, embeddings
        return self._batch
