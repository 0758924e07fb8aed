"""A prompt as the model will read it: runs of tokens and runs of image embeddings, in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.core.answer import ImageInfo


@dataclass(frozen=True, slots=True)
class TextRun:
    """Tokens that are decoded as tokens. Each takes one position."""

    tokens: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Cells of KV memory."""
        return len(self.tokens)

    @property
    def n_pos(self) -> int:
        """Positions, which the next run starts behind."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class ImageRun:
    """One chunk of one picture: `n_tokens` embeddings of width `n_embd`.

    `identity` names the embedding by content: pixels, chunk index, projector and preprocessing; equal identities have
    equal embeddings. `n_pos` is less than `n_tokens` under M-RoPE, and `positions` then holds int32 [n_tokens, 4]
    (time, height, width and one more) for a run that starts at 0, and `moves` as many of 0 and 1: which of them count
    from the run's first position (None: all). Both are None where positions just count up.
    `causal` is False for families whose pictures attend in both directions: such a run goes in one micro-batch.
    `handle` belongs to the backend and is alive until the layout is closed. A `placeholder` has no pixels behind it,
    since its embedding was known when it was laid out: it cannot be encoded.
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
        """The largest position in time that a row has, from the run's first: what the KV memory knows of the run."""
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
    """All runs of a prompt. The owner closes it when the last picture was encoded, or the request ended.

    `owned` is whatever must stay alive while `ImageRun.handle` is used; it has a `close()` of its own.
    """

    runs: tuple[Run, ...]
    images: tuple[ImageInfo, ...]
    owned: Any = field(default=None, repr=False)

    @property
    def n_tokens(self) -> int:
        """Cells of KV memory that the prompt takes."""
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
