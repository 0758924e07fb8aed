"""The context of an engine: a place of its own for each sequence, and beside them a memory that some of them share.

On a CPU neither is best for all: attention in a shared memory looks at the cells of everybody, and places of their own
hold as many copies of a picture as questions about it are being answered. So those that begin alike are brought
together, and all others stay apart. Where one memory serves all, this is a plain context.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opsin.core.backend import EmbeddingRows
from opsin.native.context import Context
from opsin.native.state import carry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from opsin.core.backend import TokenRow
    from opsin.core.settings import EngineSettings
    from opsin.native.model import Model

_COMMON_CTX = 2048  # a picture and eight short answers, also where a sequence has less


def common_cells(n_ctx_seq: int) -> int:
    """Cells of the common memory beside places of `n_ctx_seq` cells."""
    return max(n_ctx_seq, _COMMON_CTX)


class Places(Context):
    """See the module. A batch with rows of both kinds is two native ones."""

    def __init__(self, model: Model, settings: EngineSettings, *, ctx: int | None = None) -> None:
        super().__init__(model, settings, ctx=ctx)
        self._common: Context | None = None
        self._members: set[int] = set()
        self._rows: list[tuple[Context, int]] | None = None  # of the last batch, when it was two
        self._last: Context = self
        if not self.limits.shared:
            self._common = Context(model, settings, ctx=common_cells(self.limits.n_ctx_seq), beside=self)
            self.limits = replace(self.limits, common=self._common.limits.n_ctx)

    def decode(self, rows: Sequence[TokenRow] | EmbeddingRows) -> bool:
        """See Context. A batch that fails in one of both memories may have been computed in the other."""
        ids = {rows.seq_id} if isinstance(rows, EmbeddingRows) else {row.seq_id for row in rows}
        self._rows = None
        if not ids & self._members:
            self._last = self
            return super().decode(rows)
        self._last = common = self._shared()
        if isinstance(rows, EmbeddingRows) or ids <= self._members:
            return common.decode(rows)
        inside = [row for row in rows if row.seq_id in self._members]
        outside = [row for row in rows if row.seq_id not in self._members]
        # The common memory first: it may be out of room, and a place of its own is not.
        if not common.decode(inside):
            return False
        if not super().decode(outside):
            for row in reversed(inside):
                common.kv_remove(row.seq_id, row.pos, -1)
            return False
        places: list[tuple[Context, int]] = []
        for row in rows:
            context = common if row.seq_id in self._members else self
            places.append((context, sum(before[0] is context for before in places)))
        self._rows = places
        return True

    def synchronize(self) -> None:
        """See Context."""
        super().synchronize()
        if self._members:
            self._shared().synchronize()

    def logits(self, row: int) -> NDArray[Any]:
        """See Context."""
        context, row = self._place(row)
        return super().logits(row) if context is self else context.logits(row)

    def at(self, row: int) -> tuple[int, int]:
        """See Context."""
        context, row = self._place(row)
        return context.pointer, row

    def kv_last(self, seq_id: int) -> int:
        """See Context."""
        return self._shared().kv_last(seq_id) if seq_id in self._members else super().kv_last(seq_id)

    def kv_remove(self, seq_id: int, start: int, end: int) -> bool:
        """See Context."""
        if seq_id not in self._members:
            return super().kv_remove(seq_id, start, end)
        done = self._shared().kv_remove(seq_id, start, end)
        if self._shared().kv_last(seq_id) < 0:
            self._members.remove(seq_id)
        return done

    def kv_copy(self, source: int, target: int, start: int, end: int) -> None:
        """See Context."""
        if source not in self._members:
            super().kv_copy(source, target, start, end)
        elif source != target:
            self._shared().kv_copy(source, target, start, end)
            self._members.add(target)

    def kv_join(self, seq_id: int) -> None:
        """Bring a sequence to the common memory. Raises DecodeFailed when there is no room, and nothing changed."""
        carry(self, seq_id, self._shared(), seq_id)
        super().kv_remove(seq_id, 0, -1)
        self._members.add(seq_id)

    def kv_leave(self, seq_id: int) -> None:
        """Bring a sequence from the common memory back to its own place."""
        carry(self._shared(), seq_id, self, seq_id)
        self._shared().kv_remove(seq_id, 0, -1)
        self._members.discard(seq_id)

    def _shared(self) -> Context:
        assert self._common is not None, "limits.common says that there is a common memory"
        return self._common

    def _place(self, row: int) -> tuple[Context, int]:
        return (self._last, row) if self._rows is None else self._rows[row]
