"""Counters of the engine, written by its thread and read by anybody as one frozen snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsin.core.answer import Answer
from opsin.engine.plan import Encode, PrefillImage, Step, Tokens

if TYPE_CHECKING:
    from opsin.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counts since the start, and what is so now; seconds and tokens.

    `prompt_tokens` are those of all prompts that were admitted, `prefix_hits` the part found in the KV memory. A
    picture chunk whose rows are to be decoded was either encoded for it (`encodes`) or remembered (`picture_hits`).
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
    picture_hits: int = 0
    encodes: int = 0
    encode_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    prefill_tokens: int = 0


class Stats:
    """One writer, the engine's thread. Anybody may take a snapshot, which never changes under its reader."""

    def __init__(self) -> None:
        self.failed = 0
        self._counts = dict.fromkeys(Snapshot.__dataclass_fields__, 0.0)
        self._scheduler: Scheduler | None = None

    def ran(self, step: Step, seconds: float, encoded: int = 0) -> None:
        """A step was carried out; `encoded` chunks went through the encoder in it."""
        counts = self._counts
        if isinstance(step, Encode):
            counts["encodes"] += encoded
            counts["encode_seconds"] += seconds
        elif isinstance(step, PrefillImage):
            counts["prefill_tokens"] += step.stop - step.start
        elif isinstance(step, Tokens):
            counts["decode_steps"] += bool(step.decode)
            counts["decode_tokens"] += len(step.decode)
            counts["prefill_tokens"] += sum(len(part.tokens) for part in step.prefill)
            if not step.prefill:
                counts["decode_seconds"] += seconds

    def admitted(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A request began behind what the KV memory held of its prompt."""
        self._counts["prompt_tokens"] += prompt_tokens
        self._counts["prefix_hits"] += cached_tokens

    def picture_known(self) -> None:
        """A picture chunk did not have to be encoded."""
        self._counts["picture_hits"] += 1

    def drew(self) -> None:
        """A token was drawn."""
        self._counts["generated_tokens"] += 1

    def finished(self, answer: Answer) -> None:
        """An answer is complete."""
        self._counts["finished"] += 1
        self._counts["guard_stops"] += answer.guard is not None

    def watch(self, scheduler: Scheduler) -> None:
        """From now on snapshots tell of this scheduler."""
        self._scheduler = scheduler

    @property
    def snapshot(self) -> Snapshot:
        """The picture of now: each number is true, though a step may end between two of them."""
        counts, scheduler = self._counts, self._scheduler
        if scheduler is None:
            return Snapshot()
        return Snapshot(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            idle_prefixes=len(scheduler.idle_ids),
            cells_used=scheduler.book.used,
            failed=self.failed,
            preemptions=scheduler.preemptions,
            finished=int(counts["finished"]),
            guard_stops=int(counts["guard_stops"]),
            prompt_tokens=int(counts["prompt_tokens"]),
            prefix_hits=int(counts["prefix_hits"]),
            generated_tokens=int(counts["generated_tokens"]),
            picture_hits=int(counts["picture_hits"]),
            encodes=int(counts["encodes"]),
            encode_seconds=counts["encode_seconds"],
            decode_steps=int(counts["decode_steps"]),
            decode_tokens=int(counts["decode_tokens"]),
            decode_seconds=counts["decode_seconds"],
            prefill_tokens=int(counts["prefill_tokens"]),
        )
