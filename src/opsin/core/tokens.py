"""A tokenized prompt: chunks of tokens and chunks of image embeddings, in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.core.answer import ImageInfo


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Tokens that are decoded as tokens. Each takes one position and one cell of the KV cache."""

    tokens: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Cells of the KV cache."""
        return len(self.tokens)

    n_pos = n_tokens


@dataclass(frozen=True, slots=True)
class ImageChunk:
    """One chunk of one image: `n_tokens` embeddings; equal `identity` (by content) means equal embeddings.

    Under M-RoPE `n_pos` is less than `n_tokens`, `positions` is int32 [n_tokens, 4] (time, height, width, one more) for
    a chunk that starts at 0, and `moves` of the same shape is 1 where a position counts from the chunk's first (None:
    everywhere); else both are None. `causal=False`: the chunk attends in both directions and must go in one ubatch.
    `handle` belongs to the backend and lives until its TokenizedPrompt is closed. A `placeholder` has no pixels,
    because its embedding was known already, and cannot be encoded.
    """

    identity: str
    image: int
    n_tokens: int
    n_pos: int
    causal: bool = True
    placeholder: bool = False
    positions: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)
    moves: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)
    handle: Any = field(default=None, repr=False, compare=False)

    @property
    def last_pos(self) -> int:
        """The largest position in time of a row, from the chunk's first: what the KV cache knows of the chunk."""
        return self.n_tokens - 1 if self.positions is None else int(self.positions[:, 0].max())

    def positions_at(self, first: int, start: int, stop: int) -> NDArray[np.int32]:
        """Positions of rows [start, stop) of a chunk whose first position is `first`: int32 [1, n], or [4, n]."""
        if self.positions is None:
            return np.arange(first + start, first + stop, dtype=np.int32)[np.newaxis, :]
        moved = np.int32(first) if self.moves is None else self.moves[start:stop] * np.int32(first)
        return np.ascontiguousarray((self.positions[start:stop] + moved).T)


Chunk = TextChunk | ImageChunk


@dataclass(slots=True)
class TokenizedPrompt:
    """All chunks of a prompt. The owner closes it when the last image is encoded, or the request has ended.

    `owned`, which has a `close()`, must stay alive while an `ImageChunk.handle` is used.
    """

    chunks: tuple[Chunk, ...]
    images: tuple[ImageInfo, ...]
    owned: Any = field(default=None, repr=False)

    @property
    def n_tokens(self) -> int:
        """Cells of the KV cache that the prompt takes."""
        return sum(chunk.n_tokens for chunk in self.chunks)

    @property
    def n_image_tokens(self) -> int:
        """Cells that image embeddings take."""
        return sum(chunk.n_tokens for chunk in self.chunks if isinstance(chunk, ImageChunk))

    def close(self) -> None:
        """Give the backend's handles back; twice does no harm."""
        owned, self.owned = self.owned, None
        if owned is not None:
            owned.close()
