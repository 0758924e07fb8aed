"""A tokenized prompt: runs of tokens and runs of image embeddings, in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.core.answer import ImageInfo


@dataclass(frozen=True, slots=True)
class TextRun:
    """Tokens that are decoded as tokens. Each takes one position and one cell of the KV cache."""

    tokens: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Cells of the KV cache."""
        return len(self.tokens)

    n_pos = n_tokens


@dataclass(frozen=True, slots=True)
class ImageRun:
    """One chunk of one picture: `n_tokens` embeddings; equal `identity` (by content) means equal embeddings.

    Under M-RoPE `n_pos` is less than `n_tokens`, `positions` is int32 [n_tokens, 4] (time, height, width, one more) for
    a run that starts at 0, and `moves` of the same shape is 1 where a position counts from the run's first (None:
    everywhere); else both are None. `causal=False`: the run attends in both directions and must go in one ubatch.
    `handle` belongs to the backend and lives until the layout is closed. A `placeholder` has no pixels, because its
    embedding was known already, and cannot be encoded.
    """

    identity: str
    picture: int
    n_tokens: int
    n_pos: int
    causal: bool = True
    placeholder: bool = False
    positions: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)
    moves: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)
    handle: Any = field(default=None, repr=False, compare=False)

    @property
    def last_pos(self) -> int:
        """The largest position in time of a row, from the run's first: what the KV cache knows of the run."""
        return self.n_tokens - 1 if self.positions is None else int(self.positions[:, 0].max())

    def positions_at(self, first: int, start: int, stop: int) -> NDArray[np.int32]:
        """Positions of rows [start, stop) of a run whose first position is `first`: int32 [1, n], or [4, n]."""
        if self.positions is None:
            return np.arange(first + start, first + stop, dtype=np.int32)[np.newaxis, :]
        moved = np.int32(first) if self.moves is None else self.moves[start:stop] * np.int32(first)
        return np.ascontiguousarray((self.positions[start:stop] + moved).T)


Run = TextRun | ImageRun


@dataclass(slots=True)
class Layout:
    """All runs of a prompt. The owner closes it when the last picture is encoded, or the request has ended.

    `owned`, which has a `close()`, must stay alive while an `ImageRun.handle` is used.
    """

    runs: tuple[Run, ...]
    images: tuple[ImageInfo, ...]
    owned: Any = field(default=None, repr=False)

    @property
    def n_tokens(self) -> int:
        """Cells of the KV cache that the prompt takes."""
        return sum(run.n_tokens for run in self.runs)

    @property
    def n_image_tokens(self) -> int:
        """Cells that image embeddings take."""
        return sum(run.n_tokens for run in self.runs if isinstance(run, ImageRun))

    def close(self) -> None:
        """Give the backend's handles back; twice does no harm."""
        owned, self.owned = self.owned, None
        if owned is not None:
            owned.close()
