"""The context of an engine: a place of its own for each sequence, a memory that some share, and one to fill pictures.

On a CPU neither is best for all: attention in a shared memory looks at the cells of everybody, and places of their own
hold as many copies of a picture as questions about it are being answered. So those that begin alike are brought
together, and all others stay apart. Flash attention makes decode slower there and the prefill of a picture faster, so
one picture at a time is filled in a context that has it. Where one memory serves all, this is a plain context.
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

_COMMON_CTX = (2048, 4096)  # at least a picture and eight short answers, also where a sequence has less
_FILL_CTX = 2048
_TILE = 64  # rows that flash attention takes at once in ggml's kernel; with fewer it is slower than without
_LITTLE = 512  # a sequence with more cells than these stays at its place: to bring them along takes too long


def cells_beside(n_ctx_seq: int) -> tuple[int, int]:
    """Cells of the common memory, and of the one to fill pictures, beside places of `n_ctx_seq` cells."""
    least, most = _COMMON_CTX
    return min(max(n_ctx_seq, least), most), min(n_ctx_seq, _FILL_CTX)


class Places(Context):
    """See the module. A batch with rows of both kinds is two native ones."""

    def __init__(self, model: Model, settings: EngineSettings, *, ctx: int | None = None) -> None:
        super().__init__(model, settings, ctx=ctx)
        self._common: Context | None = None
        self._members: set[int] = set()
        self._rows: list[tuple[Context, int]] | None = None  # of the last batch, when it was two
        self._last: Context = self
        self._fill: Context | None = None
        self._filling: int | None = None
        if not self.limits.shared:
            common, fill = cells_beside(self.limits.n_ctx_seq)
            if settings.flash_attention is None:  # nobody chose one for all
                flash = settings.model_copy(update={"flash_attention": True})
                self._fill = Context(model, flash, ctx=fill, beside=self)
                self.limits = replace(self.limits, tile=_TILE)
            self._common = Context(model, settings, ctx=common, beside=self)
            self.limits = replace(self.limits, common=self._common.limits.n_ctx)

    def decode(self, rows: Sequence[TokenRow] | EmbeddingRows) -> bool:
        """See Context. A batch that fails in one of both memories may have been computed in the other."""
        ids = {rows.seq_id} if isinstance(rows, EmbeddingRows) else {row.seq_id for row in rows}
        self._rows = None
        if isinstance(rows, EmbeddingRows) and self._fills(rows.seq_id, len(rows.rows)):
            self._last = self._filler()
            if self._last.decode(rows):
                return True
        for seq_id in ids:
            self._settle(seq_id)
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
        if self._last is not self or self._rows is not None:
            self._last.synchronize()

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
        if seq_id == self._filling:
            return self._filler().kv_last(seq_id)
        return self._shared().kv_last(seq_id) if seq_id in self._members else super().kv_last(seq_id)

    def kv_remove(self, seq_id: int, start: int, end: int) -> bool:
        """See Context."""
        if seq_id == self._filling:
            done = self._filler().kv_remove(seq_id, start, end)
            if self._filler().kv_last(seq_id) < 0:
                self._filling = None
            return done
        if seq_id not in self._members:
            return super().kv_remove(seq_id, start, end)
        done = self._shared().kv_remove(seq_id, start, end)
        if self._shared().kv_last(seq_id) < 0:
            self._members.remove(seq_id)
        return done

    def kv_copy(self, source: int, target: int, start: int, end: int) -> None:
        """See Context."""
        self._settle(source)
        if source not in self._members:
            super().kv_copy(source, target, start, end)
        elif source != target:
            self._shared().kv_copy(source, target, start, end)
            self._members.add(target)

    def kv_join(self, seq_id: int) -> None:
        """Bring a sequence to the common memory. Raises DecodeFailed when there is no room, and nothing changed."""
        self._settle(seq_id)
        carry(self, seq_id, self._shared(), seq_id)
        super().kv_remove(seq_id, 0, -1)
        self._members.add(seq_id)

    def kv_leave(self, seq_id: int) -> None:
        """Bring a sequence from the common memory back to its own place."""
        carry(self._shared(), seq_id, self, seq_id)
        self._shared().kv_remove(seq_id, 0, -1)
        self._members.discard(seq_id)

    def _fills(self, seq_id: int, count: int) -> bool:
        """Whether a picture of this sequence is filled apart; it begins to be when nobody else's is."""
        if self._fill is None or self._filling is not None or seq_id in self._members or count < _TILE:
            return seq_id == self._filling
        held = super().kv_last(seq_id) + 1
        if held > _LITTLE:
            return False
        if held:
            carry(self, seq_id, self._fill, seq_id)
            super().kv_remove(seq_id, 0, -1)
        self._filling = seq_id
        return True

    def _settle(self, seq_id: int) -> None:
        """A sequence whose picture was filled apart goes to its own place."""
        if seq_id == self._filling:
            carry(self._filler(), seq_id, self, seq_id)
            self._filler().kv_remove(seq_id, 0, -1)
            self._filling = None

    def _filler(self) -> Context:
        assert self._fill is not None, "nobody is filled apart where it is not there"
        return self._fill

    def _shared(self) -> Context:
        assert self._common is not None, "limits.common says that there is a common memory"
        return self._common

    def _place(self, row: int) -> tuple[Context, int]:
        return (self._last, row) if self._rows is None else self._rows[row]
