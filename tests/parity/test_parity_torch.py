"""The demo model against an independent PyTorch run of the same weights, whose results are committed.

PyTorch's answer is forced on llama.cpp token by token, so one early difference cannot hide the rest.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_rows import TokenRow, batch

from opsin.core.request import EmbeddingRows, ImageChunk, ImagePart, TextPart
from opsin.core.settings import EngineSettings, ImageSettings
from opsin.images import load_image
from opsin.models.resolve import demo_pair

REFERENCE = Path(__file__).parents[2] / "training" / "reference"
TOLERANCE = 0.05
"""Logits: half-precision weights are multiplied in another order, and exp and GELU come from tables in ggml."""


@pytest.fixture(scope="module")
def backend() -> Iterator[Any]:
    from opsin.native import open_backend

    pair = demo_pair()
    made = open_backend(EngineSettings(model=pair.llm, mmproj=pair.mmproj, ctx=1024))
    yield made
    made.close()


def forced(backend: Any, row: dict[str, Any]) -> list[int]:
    """The greedy token at each position of the reference's answer."""
    backend.kv_remove(0, 0, -1)
    image = load_image(REFERENCE / row["image"], ImageSettings())
    before, after = row["prompt"].split("<image>")
    tokens = backend.tokenize([TextPart(before.removeprefix("<s>")), ImagePart(image), TextPart(after)], add_bos=True)
    pos, best = 0, -1
    for run in tokens.chunks:
        if isinstance(run, ImageChunk):
            positions = np.arange(pos, pos + run.n_tokens, dtype=np.int32)[np.newaxis, :]
            assert backend.decode(EmbeddingRows(backend.encode(run), positions, 0))
        else:
            rows = [TokenRow(token, pos + i, 0, logits=i == run.n_tokens - 1) for i, token in enumerate(run.tokens)]
            assert backend.decode(batch(rows))
            best = rows[-1].pos - pos
        pos += run.n_pos
    tokens.close()
    greedy = [backend.logprobs(best, 0, 1).top[0][0]]
    answer = row["answer_ids"][:-1]
    if answer:
        assert backend.decode(batch([TokenRow(token, pos + i, 0, logits=True) for i, token in enumerate(answer)]))
        greedy += [backend.logprobs(i, 0, 1).top[0][0] for i in range(len(answer))]
    return greedy


def test_the_reference_was_made_of_the_shipped_files() -> None:
    pair = demo_pair()
    assert pair.mmproj is not None
    for path in (pair.llm, pair.mmproj):
        expected = json.loads((REFERENCE / "parity.json").read_text())["sha256"][path.name]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == expected


def test_greedy_tokens_agree_with_pytorch(backend: Any) -> None:
    rows = json.loads((REFERENCE / "parity.json").read_text())["entries"]
    same = total = 0
    for row in rows:
        for mine, theirs, top in zip(forced(backend, row), row["answer_ids"], row["top2"], strict=True):
            total += 1
            same += mine == theirs
            if mine != theirs:
                gap = top[0][1] - top[1][1]
                assert mine == top[1][0], f"{row['image']} {row['question']}: neither of the two best"
                assert gap < TOLERANCE, f"{row['image']} {row['question']}: differs at a gap of {gap}"
    print(f"parity with PyTorch: {same} of {total} positions ({same / total:.3%}), {len(rows)} answers")
    assert len(rows) >= 100
    assert same >= 0.995 * total
