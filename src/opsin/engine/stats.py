"""Counters of the engine, written by its thread and read by anybody as a snapshot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from opsin.engine.plan import PrefillImage, Step, Tokens

if TYPE_CHECKING:
    from opsin.engine.scheduler import Scheduler


@dataclass(slots=True)
class Snapshot:
    """Counts since the start, and what is so now; seconds and tokens.

    `prompt_tokens` are those of all prompts that were admitted, `prefix_hits` the part found in the KV cache. An image
    chunk whose rows are to be decoded was either encoded for it (`encodes`) or remembered (`image_hits`).
    """

    running: int = 0
    waiting: int = 0
    idle_prefixes: int = 0
    cells_used: int = 0
    finished: int = 0
    failed: int = 0
    guard_stops: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prefix_hits: int = 0
    generated_tokens: int = 0
    image_hits: int = 0
    encodes: int = 0
    encode_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    prefill_tokens: int = 0


class Stats:
    """One writer, the engine's thread, which counts in `counts`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.counts = Snapshot()

    def ran(self, step: Step, seconds: float) -> None:
        """A step of the language model was carried out."""
        counts = self.counts
        if isinstance(step, Tokens):
            counts.decode_steps += bool(step.decode)
            counts.decode_tokens += len(step.decode)
            counts.prefill_tokens += sum(len(part.tokens) for part in step.prefill)
            if not step.prefill:
                counts.decode_seconds += seconds
        elif isinstance(step, PrefillImage):
            counts.prefill_tokens += step.stop - step.start

    def encoded(self, seconds: float, chunks: int) -> None:
        """`chunks` went through the vision encoder; none when the embedding turned out to be known."""
        self.counts.encodes += chunks
        self.counts.encode_seconds += seconds if chunks else 0.0
        self.counts.image_hits += not chunks

    @property
    def snapshot(self) -> Snapshot:
        """Now: each number is true, though a step may end between two of them."""
        scheduler = self._scheduler
        return replace(
            self.counts,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            idle_prefixes=len(scheduler.kv.idle_ids),
            cells_used=scheduler.kv.used,
            preemptions=scheduler.preemptions,
        )
