"""What one step does: a frozen value that the scheduler makes and the runner carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsin.core.layout import ImageRun
    from opsin.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Encode:
    """Run the vision encoder on the run at the sequence's cursor."""

    sequence: Sequence
    run: ImageRun


@dataclass(frozen=True, slots=True)
class PrefillText:
    """Decode prompt tokens [start, stop) of the text run at the cursor; `last` asks for the final token's logits."""

    sequence: Sequence
    tokens: tuple[int, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class PrefillImage:
    """Decode embedding rows [start, stop) of the image run at the cursor."""

    sequence: Sequence
    run: ImageRun
    start: int
    stop: int
    last: bool


@dataclass(frozen=True, slots=True)
class Decode:
    """One new token for each of these sequences, in one micro-batch."""

    sequences: tuple[Sequence, ...]


Step = Encode | PrefillText | PrefillImage | Decode
