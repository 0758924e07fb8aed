"""One request on its way: where its prompt stands, what it answered, and why it ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Literal

from opsin.cache.prefix import Prefix, cells_of, positions_of, unit_of, units_of
from opsin.core.answer import Answer, Usage
from opsin.core.backend import Embedding, Sampler
from opsin.core.errors import OpsinError
from opsin.core.layout import ImageRun, Layout, Run, TextRun
from opsin.core.sampling import FinishReason
from opsin.engine.clock import StageClock, timings
from opsin.engine.request import AnswerStream, Request
from opsin.engine.text import AnswerText

Limit = Literal["tokens", "seconds", "context", "guard"]


class State(enum.Enum):
    """A sequence goes down this list, may go from any line to the last, and from the middle back to the first."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request; changed by the engine's thread alone once it was handed over.

    The prompt is read at a cursor: `run_index` names the run, `run_offset` the next token or row in it.

        runs:      [ text 0 ........ ][ image 1 ........... ][ text 2 ... ]
        decoded:    ################   ######################  ###
        cursor:                                    run_index=2, run_offset=3

    `runs` are the layout's, and after a preemption the tokens answered so far as one more. `n_pos` is the next free
    position, `n_cells` the KV cells it sees (they differ under M-RoPE), `cached` those it got from a prefix.
    `last_token` was sampled and not yet decoded. `forced` are tokens to take instead of sampling. `prefix` is its entry
    in the KV cache manager, whose units grow with the cursor. `embeddings` are the known ones of its image chunks,
    by identity; `cached_images` had a chunk whose embedding was remembered, `encoded_images` one that was encoded for
    this request. `turn` orders who works on an image next.
    """

    request: Request
    stream: AnswerStream
    clock: StageClock
    output: AnswerText
    layout: Layout
    embeddings: dict[str, Embedding] = field(default_factory=dict, repr=False)
    runs: list[Run] = field(init=False)
    prefix: Prefix = field(init=False)
    state: State = State.WAITING
    sampler: Sampler | None = None
    run_index: int = 0
    run_offset: int = 0
    n_pos: int = 0
    n_cells: int = 0
    cached: int = 0
    preemptions: int = 0
    last_token: int = -1
    forced: list[int] = field(default_factory=list)
    cached_images: set[int] = field(default_factory=set)
    encoded_images: set[int] = field(default_factory=set)
    turn: int = 0
    finish_reason: FinishReason | None = None
    limit: Limit | None = None
    error: OpsinError | None = None

    def __post_init__(self) -> None:
        self._read_runs()

    def _read_runs(self) -> None:
        self.runs = [run for run in self.layout.runs if run.n_tokens]
        if self.output.tokens:
            self.runs.append(TextRun(tuple(self.output.tokens)))
        self.prefix = Prefix(units_of(self.runs, self.request.salt))

    @property
    def seq_id(self) -> int:
        """The id of its cells in the KV cache, -1 for none."""
        return self.prefix.seq_id

    @property
    def run(self) -> Run | None:
        """The run at the cursor; None behind the last."""
        return self.runs[self.run_index] if self.run_index < len(self.runs) else None

    @property
    def at_image(self) -> bool:
        """Whether the run at the cursor is an image chunk."""
        return isinstance(self.run, ImageRun)

    @property
    def embedding(self) -> Embedding | None:
        """The embedding of the image chunk at the cursor, when it is known."""
        run = self.run
        return self.embeddings.get(run.identity) if isinstance(run, ImageRun) else None

    @property
    def to_fill(self) -> int:
        """Cells that the rest of the prompt will take."""
        return sum(run.n_tokens for run in self.runs[self.run_index :]) - self.run_offset

    @property
    def to_encode(self) -> list[ImageRun]:
        """Image chunks from the cursor on whose embeddings are not known."""
        coming = self.runs[self.run_index :]
        return [run for run in coming if isinstance(run, ImageRun) and run.identity not in self.embeddings]

    def inside_image(self, image: int) -> bool:
        """Whether chunks of this image are still to come."""
        return any(isinstance(run, ImageRun) and run.picture == image for run in self.runs[self.run_index :])

    def start(self) -> None:
        """Begin behind the units of the prompt that are in the KV cache already."""
        shared = self.prefix.units
        self.n_cells, self.n_pos = cells_of(shared), positions_of(shared)
        self.run_index, self.run_offset = self._locate(self.n_cells)
        self.state = State.PREFILL
        if self.preemptions == 0:
            self.cached = self.n_cells
            self.cached_images |= {run.picture for run in self.runs[: self.run_index] if isinstance(run, ImageRun)}

    def _locate(self, cells: int) -> tuple[int, int]:
        for index, run in enumerate(self.runs):
            if cells < run.n_tokens:
                return index, cells
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
                # One unit: an image counts when it is whole.
                self.prefix.units.append(unit_of(run))
                self.n_pos += run.n_pos
            self.run_index += 1
            self.run_offset = 0
        if self.run is None:
            self.state = State.DECODE

    def decoded(self) -> None:
        """The last token sampled is in the KV cache now."""
        self.prefix.units.append(self.last_token)
        self.n_pos += 1
        self.n_cells += 1

    def preempt(self) -> None:
        """Its cells are needed elsewhere: it waits again, with what it answered so far as a part of its prompt."""
        self.clock.leave()
        self._read_runs()
        self.run_index = self.run_offset = 0
        self.state = State.WAITING
        self.preemptions += 1

    def adopt(self, layout: Layout) -> None:
        """Another layout of the same prompt takes the place of this one, which is closed; for one that waits."""
        self.layout.close()
        self.layout = layout
        self._read_runs()

    def drop_pixels(self) -> None:
        """All embeddings are known: neither the images nor what was preprocessed of them is needed any more."""
        self.layout.close()
        self.request = replace(self.request, prompt=replace(self.request.prompt, parts=()))
        self.stream.encoded()

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
                replace(image, cached=index in self.cached_images - self.encoded_images)
                for index, image in enumerate(self.layout.images)
            ),
            guard=self.output.verdict,
            limit=self.limit,
            logprobs=tuple(self.output.logprobs),
            tokens=tuple(self.output.tokens),
            max_tokens=self.request.max_tokens,
            intervals=self.clock.intervals(),
        )
