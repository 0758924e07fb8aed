"""What the native tests share besides fixtures: drawn images, a prefill, a generation."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from token_rows import TokenRow, batch

from opsin.core.request import EmbeddingRows, Image, ImageChunk, SamplingParams, TokenizedPrompt


def draw(seed: int = 0, width: int = 64, height: int = 48) -> Image:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8).tobytes()
    return Image(rgb, width, height, hashlib.sha256(rgb).hexdigest(), "PNG")


def prefill(backend: Any, tokenized: TokenizedPrompt, seq_id: int = 0) -> int:
    """Decode a whole tokenized prompt; the next position."""
    pos = 0
    for run in tokenized.chunks:
        last = run is tokenized.chunks[-1]
        if isinstance(run, ImageChunk):
            positions = np.arange(pos, pos + run.n_tokens, dtype=np.int32)[np.newaxis, :]
            assert backend.decode(EmbeddingRows(backend.encode(run), positions, seq_id, logits=last))
        else:
            end = len(run.tokens) - 1
            rows = [TokenRow(token, pos + i, seq_id, last and i == end) for i, token in enumerate(run.tokens)]
            assert backend.decode(batch(rows))
        pos += run.n_pos
    return pos


def held(backend: Any, params: SamplingParams, seed: int) -> Any:
    """A sampler that is held to the schema or grammar of its request."""
    return backend.sampler(params, seed, backend.check(params))


def generate(backend: Any, sampler: Any, pos: int, count: int, seq_id: int = 0) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(sampler.sample(-1))
        if tokens[-1] in backend.eog_tokens:
            break
        assert backend.decode(batch([TokenRow(tokens[-1], pos, seq_id, logits=True)]))
        pos += 1
    return tokens


TOLERANCE = 0.02
"""Natural log, f16 weights: by so much may a likelihood move when a sequence lies in other cells of the KV cache."""


def assert_undisturbed(answer: Any, alone: Any) -> None:
    """Greedy answers, with top 20 log probabilities, of one prompt: they may part where two tokens are as likely.

    Attention adds in the order of the cells, and where a sequence's cells lie depends on what ran beside it. With q8_0
    weights the last bit of such a sum can flip the rounding of an activation: logits of a tiny model moved by 0.05.
    """
    assert len(answer.tokens) == len(alone.tokens)
    for ours, right in zip(answer.logprobs, alone.logprobs, strict=True):
        likely = {token: logprob for token, _, logprob in right.top}
        assert ours.token in likely, f"token {ours.token} was not among the 20 likeliest"
        assert abs(ours.logprob - likely[ours.token]) < TOLERANCE
        assert right.logprob - likely[ours.token] < TOLERANCE
        if ours.token != right.token:
            return  # what follows is another text


@dataclass
class Child:
    code: int
    out: str
    err: str
