"""What the engine needs of a model runtime. The engine never sees a native type.

Threads: `tokenize` and `check` may be called by any thread, also while the engine's thread computes. All else belongs
to the one thread that owns the backend.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from opsin.core.answer import TokenLogprob
from opsin.core.errors import OpsinError
from opsin.core.image_options import ANY_SIZES, ImageSizes
from opsin.core.model_info import ModelInfo, Placement
from opsin.core.request import Embedding, EmbeddingRows, ImageChunk, Part, SamplingParams, TokenBatch, TokenizedPrompt


@dataclass(frozen=True, slots=True)
class BackendLimits:
    """Sizes that plans must keep to: tokens or sequences, and `n_embd`, the width of an embedding row.

    All sequences share one KV cache of `n_ctx` cells, as forks share cells; one holds at most `n_ctx_seq` tokens, which
    is less where the model was trained for less. `unified=False`: each has a part of the cells, so a fork is a copy.
    `branches=False`: no token is of several sequences. `forks=False`: one state for each sequence, which cannot be
    shared or forgotten in part. `swaps=False`: `kv_save` does not give all. Image rows are prefilled fastest in
    multiples of `tile`; `encode_batch` image chunks may be encoded at once. A ubatch of up to `mixed_rows` may hold an
    image's rows and tokens of other sequences (0: none may). `images` is what the encoder makes of the sizes of images.
    At most `n_outputs` rows of a ubatch have logits. `asynchronous`: `decode` comes back long before its work is done.
    `stops`: a `decode` that may stop does.
    """

    n_ctx: int
    n_ubatch: int
    n_seq_max: int
    n_vocab: int
    n_embd: int
    n_ctx_seq: int
    forks: bool = True
    swaps: bool = True
    tile: int = 1
    encode_batch: int = 1
    mixed_rows: int = 0
    images: ImageSizes = ANY_SIZES
    n_outputs: int = 64
    asynchronous: bool = False
    stops: bool = False
    unified: bool = True
    branches: bool = True


class Stopped(Exception):
    """Native work was ended early for something more urgent, and changed nothing."""


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

    def decode(self, rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
        """Start one ubatch of at most `n_ubatch` rows; `synchronize` waits for it. Raises DecodeFailed.

        False: there is no room in the KV cache, and nothing changed. With `may_stop` it raises Stopped once another
        thread says so, where the backend can.
        """

    def stop(self, on: bool) -> None:
        """Let a `decode` with `may_stop` end at once, now and until this is called with False. Any thread."""

    def synchronize(self) -> None:
        """Wait until all that was started is done; a stage ends after this."""

    def check(self, params: SamplingParams) -> object:
        """Compile the request's schema or grammar, maybe for seconds, for `sampler`. Any thread. Raises BadGrammar."""

    def sampler(self, params: SamplingParams, seed: int, compiled: object = None) -> Sampler:
        """A sampler for one request, held to what `check` compiled (None: to nothing)."""

    def sample(self, samples: Sequence[Sample]) -> list[tuple[int, TokenLogprob | None] | OpsinError]:
        """Sample a token for each of these rows of the last decode; what goes wrong with one is its own result."""

    def logprobs(self, row: int, token: int, top: int) -> TokenLogprob:
        """Log probabilities of the raw logits at batch row `row`: the token's own, and the `top` most likely."""

    def score(self, row: int, tokens: Sequence[int]) -> list[float]:
        """Natural log probabilities of these tokens by the raw logits at batch row `row`. Raises DecodeFailed."""

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; control tokens are empty."""

    def kv_remove(self, seq_id: int, start: int, end: int) -> bool:
        """Forget positions [start, end) of a sequence; False if this kind of memory cannot forget a part."""

    def kv_copy(self, source: int, target: int, start: int, end: int) -> None:
        """Let `target`, which ends at `start`, share positions [start, end) of `source`. Raises DecodeFailed."""

    def kv_save(self, seq_id: int) -> object:
        """A copy of all that a sequence holds, in main memory; only `kv_load` of the same backend understands it."""

    def kv_load(self, seq_id: int, saved: Any) -> None:
        """Give an empty sequence what `kv_save` gave. Raises DecodeFailed, and the sequence is empty then."""

    def kv_last(self, seq_id: int) -> int:
        """The last position held for a sequence, -1 if there is none."""

    def pause_threads(self) -> None:
        """Idle for a while: let go what is in the way of others, such as threads that wait."""

    def placement(self) -> Placement:
        """Run one encode and one prefill with the probe on, and say where they ran; it forgets sequences it used."""

    def close(self) -> None:
        """Free everything, children first; twice does no harm."""
