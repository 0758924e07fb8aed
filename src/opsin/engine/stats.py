"""Counters of the engine, written by its thread and read by anybody as one frozen snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsin.core.answer import Answer
from opsin.engine.plan import PrefillImage, Step, Tokens

if TYPE_CHECKING:
    from opsin.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counts since the start, and what is so now; seconds and tokens.

    `prompt_tokens` are those of all prompts that were admitted, `prefix_hits` the part found in the KV cache. An image
    chunk whose rows are to be decoded was either encoded for it (`encodes`) or remembered (`picture_hits`).
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
        self.finished_answers = self.failed = self.guard_stops = 0
        self.prompt_tokens = self.prefix_hits = self.prefill_tokens = self.generated_tokens = 0
        self.picture_hits = self.encodes = 0
        self.decode_steps = self.decode_tokens = 0
        self.encode_seconds = self.decode_seconds = 0.0
        self._scheduler: Scheduler | None = None

    def ran(self, step: Step, seconds: float) -> None:
        """A step of the language model was carried out."""
        if isinstance(step, Tokens):
            self.decode_steps += bool(step.decode)
            self.decode_tokens += len(step.decode)
            self.prefill_tokens += sum(len(part.tokens) for part in step.prefill)
            if not step.prefill:
                self.decode_seconds += seconds
        elif isinstance(step, PrefillImage):
            self.prefill_tokens += step.stop - step.start

    def encoded(self, seconds: float, chunks: int) -> None:
        """`chunks` went through the vision encoder; none when the embedding turned out to be known."""
        if chunks:
            self.encodes += chunks
            self.encode_seconds += seconds
        else:
            self.picture_hits += 1

    def admitted(self, prompt_tokens: int, cached_tokens: int, known_chunks: int) -> None:
        """A request began behind what the KV cache held of its prompt, with so many embeddings remembered."""
        self.prompt_tokens += prompt_tokens
        self.prefix_hits += cached_tokens
        self.picture_hits += known_chunks

    def finished(self, answer: Answer) -> None:
        """An answer is complete."""
        self.finished_answers += 1
        self.guard_stops += answer.guard is not None

    def watch(self, scheduler: Scheduler) -> None:
        """From now on snapshots tell of this scheduler."""
        self._scheduler = scheduler

    @property
    def snapshot(self) -> Snapshot:
        """Now: each number is true, though a step may end between two of them."""
        scheduler = self._scheduler
        if scheduler is None:
            return Snapshot()
        return Snapshot(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            idle_prefixes=len(scheduler.kv.idle_ids),
            cells_used=scheduler.kv.used,
            finished=self.finished_answers,
            failed=self.failed,
            guard_stops=self.guard_stops,
            preemptions=scheduler.preemptions,
            prompt_tokens=self.prompt_tokens,
            prefix_hits=self.prefix_hits,
            generated_tokens=self.generated_tokens,
            picture_hits=self.picture_hits,
            encodes=self.encodes,
            encode_seconds=self.encode_seconds,
            decode_steps=self.decode_steps,
            decode_tokens=self.decode_tokens,
            decode_seconds=self.decode_seconds,
            prefill_tokens=self.prefill_tokens,
        )
