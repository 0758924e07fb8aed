"""What happens next, as frozen values: the scheduler makes them, the runner carries them out.

A plan is memory operations first, in order, then at most one step. Steps take one micro-batch each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container

    from opsin.core.layout import ImageRun
    from opsin.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Forget:
    """Free the cells from position `start` on that only this sequence id holds."""

    seq_id: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Fork:
    """Give `target`, which is empty, positions [0, end) of `source`; an end of -1 is behind the last."""

    source: int
    target: int
    end: int


@dataclass(frozen=True, slots=True)
class Join:
    """Bring a sequence's cells from its own place to the common memory; forks of it share them there."""

    seq_id: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Bring a sequence's cells from the common memory back to its own place."""

    seq_id: int


@dataclass(frozen=True, slots=True)
class Encode:
    """Run the vision encoder on the picture chunk at the sequence's cursor, unless its embedding is known.

    `beside` are chunks that the encoder can take in the same call, with the sequences that have them.
    """

    sequence: Sequence
    run: ImageRun
    beside: tuple[tuple[Sequence, ImageRun], ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillImage:
    """Decode embedding rows [start, stop) of the picture chunk at the cursor; `last` asks for logits."""

    sequence: Sequence
    run: ImageRun
    start: int
    stop: int
    last: bool


@dataclass(frozen=True, slots=True)
class Slice:
    """Some tokens of one sequence, at its next positions; `last` asks for the last one's logits."""

    sequence: Sequence
    tokens: tuple[int, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """One new token for each sequence that answers, and slices of prompts, all in one micro-batch."""

    decode: tuple[Sequence, ...]
    prefill: tuple[Slice, ...] = ()


MemoryOp = Forget | Fork | Join | Leave
Step = Encode | PrefillImage | Tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory operations, then a step; None when there is nothing to compute."""

    memory: tuple[MemoryOp, ...] = ()
    step: Step | None = None


def cells_needed(step: Step, among: Container[int] | None = None) -> int:
    """KV cells that a step takes, or only those for the sequences with an id in `among`."""
    needed = 0
    if isinstance(step, PrefillImage):
        needed = step.stop - step.start if among is None or step.sequence.seq_id in among else 0
    elif isinstance(step, Tokens):
        rows = [(s, 1) for s in step.decode] + [(part.sequence, len(part.tokens)) for part in step.prefill]
        needed = sum(count for sequence, count in rows if among is None or sequence.seq_id in among)
    return needed


def without(step: Step, sequence: Sequence) -> Step | None:
    """What is left of a step when one sequence is not part of it any more."""
    if not isinstance(step, Tokens):
        return None if step.sequence is sequence else step
    decode = tuple(s for s in step.decode if s is not sequence)
    prefill = tuple(part for part in step.prefill if part.sequence is not sequence)
    return Tokens(decode, prefill) if decode or prefill else None


def members_of(step: Step) -> tuple[Sequence, ...]:
    """All sequences that a step computes for."""
    if isinstance(step, Tokens):
        return (*step.decode, *(part.sequence for part in step.prefill))
    return (step.sequence,)
