"""A token given as its embedding is the token: the same logits, whatever the type of the table and the architecture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_rows import TokenRow, batch

from opsin.core.errors import DecodeFailed
from opsin.core.request import EmbeddingRows, TokenBatch
from opsin.core.settings import EngineSettings
from opsin.native import open_backend
from opsin.native.model import TokenTable
from synth import LLM_TYPES, write_pair


def opened(kind: str, quantisation: str, folder: Path) -> Any:
    pair = write_pair(kind, folder, quantisation=quantisation)
    return open_backend(EngineSettings(model=pair.llm, mmproj=pair.mmproj, ctx=256, parallel=2, ubatch=64, threads=1))


@pytest.mark.parametrize(("kind", "quantisation"), [*(("tiny", kind) for kind in LLM_TYPES), ("qwen2vl-tiny", "f16")])
def test_a_tokens_embedding_is_the_token(kind: str, quantisation: str, tmp_path: Path) -> None:
    backend = opened(kind, quantisation, tmp_path)
    try:
        table, n_pos = TokenTable(backend.model), backend.model.n_pos
        tokens = [1, 70, backend.limits.n_vocab - 1]
        assert backend.decode(batch(TokenRow(token, pos, 0, True) for pos, token in enumerate(tokens)))
        as_tokens = np.stack([backend.logits(row).copy() for row in range(3)])
        backend.kv_remove(0, 0, -1)
        positions = np.tile(np.arange(3, dtype=np.int32), (n_pos, 1))
        assert backend.decode(EmbeddingRows(table.rows(tokens), positions, 0, logits=True))
        np.testing.assert_allclose(backend.logits(2), as_tokens[2], atol=1e-5)
    finally:
        backend.close()


def test_a_model_that_scales_its_tokens_takes_none_beside_an_image(tmp_path: Path) -> None:
    backend = opened("gemma3-tiny", "f16", tmp_path)
    try:
        assert backend.limits.mixed_rows == 0
        rows = EmbeddingRows(np.zeros((1, backend.limits.n_embd), np.float32), np.zeros((1, 1), np.int32), 0)
        beside = TokenBatch([1], [0], [1], [0])
        with pytest.raises(DecodeFailed):
            backend.decode(EmbeddingRows(rows.rows, rows.positions, 0, beside=beside))
    finally:
        backend.close()
