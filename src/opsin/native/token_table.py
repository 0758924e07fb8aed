"""A model's token embeddings, read from its file: what lets a token go into a batch of image embeddings.

`llama_batch` holds tokens or embeddings, never both, and reading all weights for a batch of one token costs as much as
for thirty rows. With its embedding a token can go beside an image's rows.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from opsin.core.ggml_types import TENSOR_TYPES
from opsin.native.ggml import GgufInitParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opsin.core.request import Embedding
    from opsin.native.model import Model

# Architectures whose graph does the same to a token's embedding and to an image's (llama.cpp's src/models). Others
# scale a token's (gemma), or take more of a token than its embedding.
_PLAIN = frozenset({"internlm2", "llama", "mistral3", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "qwen3vlmoe", "smollm3"})


class TokenTable:
    """Rows of `token_embd.weight`; a view of the file, so only rows that are asked for are read."""

    def __init__(self, model: Model) -> None:
        """Raises LookupError for models whose tokens cannot be given as embeddings."""
        ggml = model.lib.ggml
        if model.metadata("general.architecture") not in _PLAIN:
            raise LookupError
        file = ggml.gguf_init_from_file(os.fsencode(model.path), GgufInitParams(True, None))
        at = ggml.gguf_find_tensor(file, b"token_embd.weight") if file else -1
        try:
            if at < 0:
                raise LookupError
            kind, size = ggml.gguf_get_tensor_type(file, at), ggml.gguf_get_tensor_size(file, at)
            offset = ggml.gguf_get_data_offset(file) + ggml.gguf_get_tensor_offset(file, at)
        finally:
            ggml.gguf_free(file)  # a null pointer does no harm
        traits = ggml.ggml_get_type_traits(kind).contents
        self._width, self._padded = model.lib.llama.llama_model_n_embd(model.pointer), model.n_embd
        row = self._width // traits.block * traits.size
        self._to_float = traits.to_float
        known = TENSOR_TYPES[kind][1:] == (traits.block, traits.size) and size == row * model.n_vocab
        if not (known and self._to_float):
            raise LookupError
        self._rows = np.memmap(model.path, np.uint8, "r", offset, (model.n_vocab, row))

    def rows(self, tokens: Sequence[int]) -> Embedding:
        """The embeddings of these tokens, float32 [n, n_embd]; behind them zeros where images take more (deepstack)."""
        found = np.zeros((len(tokens), self._padded), np.float32)
        for place, token in zip(found, tokens, strict=True):
            row = self._rows[token]
            self._to_float(row.ctypes.data, place.ctypes.data, self._width)
        return found
