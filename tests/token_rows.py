"""Batches for the language model, written row by row."""

from collections.abc import Iterable
from typing import NamedTuple

from opsin.core.request import TokenBatch


class TokenRow(NamedTuple):
    """One token of a batch."""

    token: int
    pos: int
    seq_id: int
    logits: bool = False


def batch(rows: Iterable[TokenRow]) -> TokenBatch:
    rows = list(rows)
    outputs = [index for index, row in enumerate(rows) if row.logits]
    return TokenBatch([r.token for r in rows], [r.pos for r in rows], [r.seq_id for r in rows], outputs)
