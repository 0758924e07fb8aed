"""What the engine counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opsin.core.answer import Answer
from opsin.engine.request import Sequence
from opsin.engine.scheduler import Scheduler
from opsin.engine.step import PrefillImage, Tokens


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
    draft_tokens: int = 0
    draft_accepted: int = 0
    prefill_tokens: int = 0

    def count_step(self, step: Tokens | PrefillImage, seconds: float, *, alone: bool) -> None:
        """A step of the language model took so long, `alone` or within an encode."""
        self.decode_steps += bool(step.decode)
        self.decode_tokens += len(step.decode)
        if isinstance(step, PrefillImage):
            self.prefill_tokens += step.rows
            return
        self.prefill_tokens += sum(len(part.tokens) for part in step.prefill)
        if alone and not step.prefill:
            self.decode_seconds += seconds

    def seen(self, scheduler: Scheduler) -> Snapshot:
        """A copy, with what is so now: each number is true, though a step may end between two of them."""
        return replace(
            self,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            idle_prefixes=len(scheduler.kv.idle) + len(scheduler.kv.swapped),
            cells_used=scheduler.kv.cells.used,
            preemptions=scheduler.preemptions,
        )

    def count_prompt(self, sequence: Sequence) -> None:
        """A request was admitted."""
        self.prompt_tokens += sequence.tokenized.n_tokens
        self.prefix_hits += sequence.cached
        self.image_hits += sum(chunk.identity in sequence.embeddings for chunk in sequence.images_ahead)

    def count_answer(self, answer: Answer) -> None:
        """A request was answered."""
        self.finished += 1
        self.guard_stops += answer.guard is not None

    def count_encode(self, chunks: int, seconds: float) -> None:
        """An encode of so many chunks took so long, standing still aside; without chunks it was remembered."""
        self.encodes += chunks
        self.encode_seconds += seconds if chunks else 0.0
        self.image_hits += not chunks

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """So many tokens of drafts were computed, and so many of them accepted."""
        self.draft_tokens += drafted
        self.draft_accepted += accepted
        self.decode_tokens += accepted
