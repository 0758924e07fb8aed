"""One request on its way: where its prompt stands, what it answered, and why it ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Literal

from opsin.cache.prefix import Prefix
from opsin.cache.units import cells_of, positions_of, unit_of, units_of
from opsin.core.answer import Answer, Usage
from opsin.core.backend import Embedding, Sampler
from opsin.core.errors import OpsinError
from opsin.core.layout import ImageRun, Layout, Run, TextRun
from opsin.core.sampling import FinishReason
from opsin.engine.clock import StageClock, timings
from opsin.engine.output import Output
from opsin.engine.request import AnswerStream, Request

Limit = Literal["tokens", "seconds", "context", "guard"]


class State(enum.Enum):
    """A sequence goes down this list, may go from any line to the last, and from the middle back to the first."""

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

    `runs` are the layout's, and after a preemption the tokens answered so far as one more. `n_pos` is the next free
    position, `n_cells` the KV cells it sees (they differ under M-RoPE), `cached` those it got from a prefix.
    `last_token` was drawn and not yet decoded. `forced` are tokens to take instead of drawing. `prefix` is its entry
    in the prefix index, whose units grow with the cursor. `known_pictures` had a chunk whose embedding was remembered,
    `encoded_pictures` one that was encoded for this request. `turn` orders who works on a picture next.
    """

    request: Request
    stream: AnswerStream
    clock: StageClock
    output: Output
    layout: Layout
    runs: list[Run] = field(init=False)
    prefix: Prefix = field(init=False)
    state: State = State.WAITING
    seq_id: int = -1
    sampler: Sampler | None = None
    run_index: int = 0
    run_offset: int = 0
    n_pos: int = 0
    n_cells: int = 0
    cached: int = 0
    preemptions: int = 0
    last_token: int = -1
    forced: list[int] = field(default_factory=list)
    embedding: Embedding | None = field(default=None, repr=False)
    known_pictures: set[int] = field(default_factory=set)
    encoded_pictures: set[int] = field(default_factory=set)
    turn: int = 0
    finish_reason: FinishReason | None = None
    limit: Limit | None = None
    error: OpsinError | None = None

    def __post_init__(self) -> None:
        self.runs = [run for run in self.layout.runs if run.n_tokens]
        self.prefix = Prefix(-1, planned=units_of(self.runs, self.request.salt))

    @property
    def run(self) -> Run | None:
        """The run at the cursor; None behind the last."""
        return self.runs[self.run_index] if self.run_index < len(self.runs) else None

    @property
    def at_image(self) -> bool:
        """Whether the run at the cursor is a picture chunk."""
        return isinstance(self.run, ImageRun)

    @property
    def to_fill(self) -> int:
        """Cells that the rest of the prompt will take."""
        return sum(run.n_tokens for run in self.runs[self.run_index :]) - self.run_offset

    def inside_picture(self, picture: int) -> bool:
        """Whether chunks of this picture are still to come."""
        return any(isinstance(run, ImageRun) and run.picture == picture for run in self.runs[self.run_index :])

    def start(self, seq_id: int, ready: int) -> None:
        """Begin behind the first `ready` units of the prompt, which are in the memory already."""
        shared = self.prefix.planned[:ready]
        self.seq_id = self.prefix.seq_id = seq_id
        self.prefix.units = list(shared)
        self.n_cells, self.n_pos = cells_of(shared), positions_of(shared)
        if self.preemptions == 0:
            self.cached = self.n_cells
        self.run_index, self.run_offset, self.embedding = self._locate(self.n_cells)
        self.state = State.PREFILL
        if self.preemptions == 0:
            self.known_pictures |= {run.picture for run in self.runs[: self.run_index] if isinstance(run, ImageRun)}

    def move(self, seq_id: int) -> None:
        """Its cells are under another id from now on."""
        self.seq_id = self.prefix.seq_id = seq_id

    def _locate(self, cells: int) -> tuple[int, int, None]:
        for index, run in enumerate(self.runs):
            if cells < run.n_tokens:
                return index, cells, None
            cells -= run.n_tokens
        raise AssertionError("at least one unit of a prompt is decoded")

    def advance(self, tokens: int) -> None:
        """`tokens` more of the run at the cursor were decoded."""
        run = self.run
        assert run is not None
        before = self.run_offset
        self.run_offset += tokens
        self.n_cells += tokens
        assert self.run_offset <= run.n_tokens, "the cursor left its run"
        if isinstance(run, TextRun):
            self.prefix.units.extend(run.tokens[before : self.run_offset])
            self.n_pos += tokens
        if self.run_offset == run.n_tokens:
            if isinstance(run, ImageRun):
                # One unit: a picture counts when it is whole.
                self.prefix.units.append(unit_of(run))
                self.n_pos += run.n_pos
            self.run_index += 1
            self.run_offset = 0
            self.embedding = None
        if self.run is None:
            self.state = State.DECODE

    def decoded(self) -> None:
        """The last token drawn is in the memory now."""
        self.prefix.units.append(self.last_token)
        self.n_pos += 1
        self.n_cells += 1

    def preempt(self) -> None:
        """Its cells are needed elsewhere: it waits again, with what it answered so far as a part of its prompt."""
        answered = tuple(self.output.tokens)
        self.runs = [run for run in self.layout.runs if run.n_tokens]
        if answered:
            self.runs.append(TextRun(answered))
        self.prefix = Prefix(-1, planned=units_of(self.runs, self.request.salt))
        self.seq_id, self.state, self.embedding = -1, State.WAITING, None
        self.preemptions += 1

    def adopt(self, layout: Layout) -> None:
        """Another layout of the same prompt takes the place of this one, which is closed."""
        runs = [run for run in layout.runs if run.n_tokens]
        assert [run.n_tokens for run in runs] == [run.n_tokens for run in self.layout.runs if run.n_tokens]
        self.runs[: len(runs)] = runs
        self.layout.close()
        self.layout = layout

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
            cached_tokens=self.cached,
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
            images=tuple(
                replace(image, cached=index in self.known_pictures - self.encoded_pictures)
                for index, image in enumerate(self.layout.images)
            ),
            guard=self.output.verdict,
            limit=self.limit,
            logprobs=tuple(self.output.logprobs),
            tokens=tuple(self.output.tokens),
            max_tokens=self.request.max_tokens,
            intervals=self.clock.intervals(),
        )
