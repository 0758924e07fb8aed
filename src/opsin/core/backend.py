"""What the engine needs of a model runtime. The engine never sees a native type.

Threads: `tokenize` and `check` may be called by any thread, also while the engine's thread computes. All else belongs
to the one thread that owns the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from opsin.core.answer import TokenLogprob
from opsin.core.errors import OpsinError
from opsin.core.model_info import ModelInfo
from opsin.core.placement import Placement
from opsin.core.prompt import Part
from opsin.core.sampling import SamplingParams
from opsin.core.tokens import ImageChunk, TokenizedPrompt

Embedding = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BackendLimits:
    """Sizes that plans must keep to: tokens or sequences, and `n_embd`, the width of an embedding row.

    All sequences share one KV cache of `n_ctx` cells, as forks share cells; one sequence holds at most `n_ctx_train`
    tokens (0: unknown). `forks=False`: one state for each sequence, which cannot be shared or forgotten in part. Image
    rows are prefilled fastest in multiples of `tile`; `encode_batch` image chunks may be encoded at once.
    """

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_vocab: int
    n_embd: int
    n_ctx_train: int = 0
    forks: bool = True
    tile: int = 1
    encode_batch: int = 1

    @property
    def n_ctx_seq(self) -> int:
        """Tokens that one sequence may hold."""
        return min(self.n_ctx, self.n_ctx_train or self.n_ctx)


@dataclass(slots=True)
class TokenBatch:
    """Tokens of one ubatch, row by row: the token, its position, its sequence; `outputs` are rows that want logits."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    seq_ids: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def append(self, tokens: Sequence[int], start: int, seq_id: int, *, logits: bool) -> None:
        """Tokens of one sequence from position `start` on; with `logits` the last one's are wanted."""
        self.tokens.extend(tokens)
        self.positions.extend(range(start, start + len(tokens)))
        self.seq_ids.extend([seq_id] * len(tokens))
        if logits:
            self.outputs.append(len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """A slice of an image's embedding for one sequence: `rows` is float32 [n, n_embd], contiguous.

    `positions` is absolute, int32 [4, n] (section-major) under M-RoPE, else [1, n]. With `logits` the last row's are
    kept. `causal=False` asks for attention in both directions.
    """

    rows: Embedding
    positions: NDArray[np.int32]
    seq_id: int
    logits: bool = False
    causal: bool = True


class Sampler(Protocol):
    """How tokens of one request are sampled, with its state. Made by a backend, and closed before it."""

    def close(self) -> None:
        """Free it; twice does no harm."""


Sample = tuple[Sampler, int, int | None]
"""A sampler, the row of the last batch that it samples from, and how many log probabilities are wanted (None: none)."""


class Backend(Protocol):
    """A language model with its KV cache and, where the pair has one, a vision encoder.

    Samplers and tokenized prompts are closed before the backend. Ranges of positions exclude their end; -1 is the last.
    """

    @property
    def limits(self) -> BackendLimits:
        """Sizes that plans must keep to."""

    @property
    def info(self) -> ModelInfo:
        """Names of the pair."""

    @property
    def eog_tokens(self) -> frozenset[int]:
        """Tokens that end a turn."""

    def tokenize(
        self, parts: Sequence[Part], *, add_bos: bool, known: Callable[[str], bool] | None = None
    ) -> TokenizedPrompt:
        """Tokenize the text and preprocess the images, except those whose identities are all `known`. Any thread.

        Raises BadImage if the preprocessing refuses an image, BadInput if the pair has no vision encoder.
        """

    def encode(self, run: ImageChunk, between: Callable[[], None] | None = None) -> Embedding:
        """Run the vision encoder on one chunk; float32 [n_tokens, n_embd], owned by the caller. Raises EncodeFailed.

        `between` is called between layers; what it raises is raised after the encode, whose embedding is lost.
        """

    def encode_many(self, runs: Sequence[ImageChunk]) -> list[Embedding]:
        """Encode several chunks, those of equal pixel sizes at once; in the same order. Raises EncodeFailed."""

    def decode(self, rows: TokenBatch | EmbeddingRows) -> bool:
        """Start one ubatch of at most `n_ubatch` rows; `synchronize` waits for it. Raises DecodeFailed.

        False: there is no room in the KV cache, and nothing changed.
        """

    def synchronize(self) -> None:
        """Wait until all that was started is done; a stage ends after this."""

    def check(self, params: SamplingParams) -> None:
        """Compile the request's schema or grammar for `sampler`, maybe for seconds. Any thread. Raises BadGrammar."""

    def sampler(self, params: SamplingParams, seed: int) -> Sampler:
        """A sampler for one request. Raises BadGrammar."""

    def sample(self, samples: Sequence[Sample]) -> list[tuple[int, TokenLogprob | None] | OpsinError]:
        """Sample a token for each of these rows of the last decode; what goes wrong with one is its own result."""

    def logprobs(self, row: int, token: int, top: int) -> TokenLogprob:
        """Log probabilities of the raw logits at batch row `row`: the token's own, and the `top` most likely."""

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; control tokens are empty."""

    def kv_remove(self, seq_id: int, start: int, end: int) -> bool:
        """Forget positions [start, end) of a sequence; False if this kind of memory cannot forget a part."""

    def kv_copy(self, source: int, target: int, start: int, end: int) -> None:
        """Let `target`, which ends at `start`, share positions [start, end) of `source`. Raises DecodeFailed."""

    def kv_last(self, seq_id: int) -> int:
        """The last position held for a sequence, -1 if there is none."""

    def pause_threads(self) -> None:
        """Idle for a while: let go what is in the way of others, such as threads that wait."""

    def placement(self) -> Placement:
        """Run one encode and one prefill with the probe on, and say where they ran; it forgets sequences it used."""

    def close(self) -> None:
        """Free everything, children first; twice does no harm."""
