"""What happens next, as frozen values: the scheduler makes them, the runner carries them out.

A plan is KV cache operations first, in order, then at most one step. A step is one ubatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsin.core.request import ImageChunk
    from opsin.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Forget:
    """Free the cells that only this sequence id holds."""

    seq_id: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Let `target`, which is empty, share positions [0, end) of `source`."""

    source: int
    target: int
    end: int


@dataclass(frozen=True, slots=True)
class Encode:
    """Run the vision encoder on the image chunk at the sequence's cursor, unless its embedding is known.

    `beside` are chunks that the encoder can take in the same call, with the sequences that have them.
    """

    sequence: Sequence
    chunk: ImageChunk
    beside: tuple[tuple[Sequence, ImageChunk], ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillImage:
    """Decode embedding rows [start, stop) of the image chunk at the cursor; `last` asks for logits."""

    sequence: Sequence
    chunk: ImageChunk
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
    """One new token for each sequence that answers, and slices of prompts, all in one ubatch."""

    decode: tuple[Sequence, ...]
    prefill: tuple[Slice, ...] = ()


KVOp = Forget | Fork
Step = Encode | PrefillImage | Tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """KV cache operations, then a step; None when there is nothing to compute."""

    memory: tuple[KVOp, ...] = ()
    step: Step | None = None


def cells_needed(step: Step) -> int:
    """KV cells that a step takes."""
    if isinstance(step, PrefillImage):
        return step.stop - step.start
    if isinstance(step, Tokens):
        return len(step.decode) + sum(len(part.tokens) for part in step.prefill)
    return 0


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
