"""The rows of a ubatch as llama.cpp wants them."""

import ctypes
from typing import Any

import numpy as np

from opsin.core.request import Embedding, EmbeddingRows, TokenBatch


class BatchArrays:
    """The arrays of one ubatch of `capacity` rows, made once: `llama_batch` is a struct of bare pointers into them.

    A row has `n_pos` positions: 1, or 4 under M-RoPE, section after section, for which `llama_batch_init` has no room.
    It belongs to its sequence, and with a `keeper` offset also to the sequence that many ids further on; a row of a
    label to as many as share it, `most` at most.
    """

    def __init__(self, batch_type: Any, capacity: int, n_pos: int, keeper: int = 0, most: int = 1) -> None:
        self._n_pos = n_pos
        # Added to a row's sequence: its ids. llama.cpp masks by any one of them: both hold the same cells.
        self._ids = np.array([0, keeper] if keeper else [0], np.int32)
        self._token, self._pos = np.zeros(capacity, np.int32), np.zeros(capacity * n_pos, np.int32)
        self._n_seq_id = np.full(capacity, len(self._ids), np.int32)
        self._seq_id = np.zeros((capacity, most * len(self._ids)), np.int32)
        self._logits = np.zeros(capacity, np.int8)
        # A row's list of ids is one row of _seq_id.
        self._rows = self._seq_id.ctypes.data + self._seq_id.strides[0] * np.arange(capacity, dtype=np.uintp)
        self._types = dict(batch_type._fields_)
        self._batch = batch_type()
        fields: Any = {"pos": self._pos, "n_seq_id": self._n_seq_id, "seq_id": self._rows, "logits": self._logits}
        for field, array in fields.items():
            setattr(self._batch, field, self._pointer(array, field))
        self._tokens = self._pointer(self._token, "token")
        self._data: Embedding

    def _pointer(self, array: np.ndarray[Any, Any], field: str) -> Any:
        # Not `data_as`: each call of it leaves a cycle for the garbage collector.
        return ctypes.cast(array.ctypes.data, self._types[field])

    def tokens(self, batch: TokenBatch) -> Any:
        """A `llama_batch` of tokens, valid until the next call."""
        count = len(batch.tokens)
        self._token[:count] = batch.tokens
        self._pos[:count] = batch.positions
        self._owners(batch, count)
        self._batch.n_tokens, self._batch.token, self._batch.embd = count, self._tokens, None
        return self._batch

    def embeddings(self, rows: EmbeddingRows, data: Embedding) -> Any:
        """A `llama_batch` of `data`: tokens beside, `rows`, tokens behind; valid until the next call."""
        count, tokens, end = len(data), len(rows.beside.tokens), len(data) - len(rows.behind)
        self._owners(rows.beside, count)
        positions = self._pos[: count * self._n_pos].reshape(self._n_pos, count)
        # A token's sections have one position, but the last of four, which is 0: as llama.cpp does it for tokens.
        positions[:, :tokens] = rows.beside.positions
        positions[:, tokens:end] = rows.positions
        positions[:, end:] = np.arange(rows.behind_at, rows.behind_at + count - end)
        positions[3:, :tokens] = positions[3:, end:] = 0
        self._seq_id[tokens:count, : len(self._ids)] = rows.seq_id + self._ids
        self._logits[count - 1] |= rows.logits
        self._data = data  # which the batch points into
        self._batch.n_tokens, self._batch.token, self._batch.embd = count, None, self._pointer(data, "embd")
        return self._batch

    def _owners(self, batch: TokenBatch, count: int) -> None:
        """The sequences of a batch's tokens, and which of `count` rows want logits."""
        width = len(self._ids)
        self._seq_id[: len(batch.tokens), :width] = np.array(batch.seq_ids, np.int32)[:, np.newaxis] + self._ids
        self._n_seq_id[:count] = width
        for row, others in batch.shared.items():
            ids = np.add.outer(others, self._ids).ravel()
            self._seq_id[row, width : width + len(ids)] = ids
            self._n_seq_id[row] += len(ids)
        self._logits[:count] = 0
        self._logits[batch.outputs] = 1
