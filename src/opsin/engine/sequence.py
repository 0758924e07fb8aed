"""One request on its way: where its prompt stands, what it answered, and why it ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from opsin.core.answer import Answer, ImageInfo, Usage
from opsin.core.backend import Embedding, Sampler
from opsin.core.layout import ImageRun, Layout, Run
from opsin.core.sampling import FinishReason
from opsin.engine.clock import StageClock, timings
from opsin.engine.output import Output
from opsin.engine.request import AnswerStream, Request

Limit = Literal["tokens", "seconds", "context", "guard"]


class State(enum.Enum):
    """A sequence goes down this list, and may go from any line to the last."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request; changed by the engine's thread alone.

    The prompt is read at a cursor: `run_index` names the run, `run_offset` the next token or row in it.

        runs:      [ text 0 ........ ][ image 1 ........... ][ text 2 ... ]
        decoded:    ################   ######################  ###
        cursor:                                    run_index=2, run_offset=3

    `n_pos` is the next free position, `n_cells` the KV cells in use (they differ under M-RoPE). `last_token` was drawn
    and not yet decoded. `forced` are tokens to take instead of drawing.
    """

    request: Request
    stream: AnswerStream
    clock: StageClock
    output: Output
    layout: Layout
    state: State = State.WAITING
    seq_id: int = -1
    sampler: Sampler | None = None
    run_index: int = 0
    run_offset: int = 0
    n_pos: int = 0
    n_cells: int = 0
    last_token: int = -1
    forced: list[int] = field(default_factory=list)
    embedding: Embedding | None = field(default=None, repr=False)
    images: list[ImageInfo] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    limit: Limit | None = None

    @property
    def run(self) -> Run | None:
        """The run at the cursor; None behind the last."""
        return self.layout.runs[self.run_index] if self.run_index < len(self.layout.runs) else None

    @property
    def needs_encode(self) -> bool:
        """Whether the run at the cursor is a picture whose embedding is not there yet."""
        return isinstance(self.run, ImageRun) and self.embedding is None

    def advance(self, tokens: int) -> None:
        """`tokens` more of the run at the cursor were decoded."""
        run = self.run
        assert run is not None
        self.run_offset += tokens
        self.n_cells += tokens
        assert self.run_offset <= run.n_tokens, "the cursor left its run"
        if self.run_offset == run.n_tokens:
            self.n_pos += run.n_pos
            self.run_index += 1
            self.run_offset = 0
            self.embedding = None
        if self.run is None:
            self.state = State.DECODE

    def end(self, reason: FinishReason, limit: Limit | None = None) -> None:
        """The answer ends here; the first reason counts."""
        if self.state is not State.DONE:
            self.state, self.finish_reason, self.limit = State.DONE, reason, limit

    def answer(self) -> Answer:
        """The whole answer, with the account of its time; called once, at the end."""
        assert self.finish_reason is not None
        stages = self.clock.freeze()
        usage = Usage(
            prompt_tokens=self.layout.n_tokens,
            completion_tokens=len(self.output.tokens),
            image_tokens=self.layout.n_image_tokens,
            cached_tokens=0,
        )
        return Answer(
            text=self.output.text,
            reasoning=self.output.reasoning,
            finish_reason=self.finish_reason,
            usage=usage,
            stages=stages,
            timings=timings(
                stages,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                predicted_tokens=usage.completion_tokens,
            ),
            images=tuple(self.images),
            guard=self.output.verdict,
            limit=self.limit,
            logprobs=tuple(self.output.logprobs),
            tokens=tuple(self.output.tokens),
            max_tokens=self.request.max_tokens,
        )
