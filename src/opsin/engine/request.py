"""One request: where its prompt stands, what it answered, and why it ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Literal

from opsin.cache import Prefix, units_of
from opsin.core.answer import Answer, FinishReason, Stage, TokenLogprob, Usage
from opsin.core.backend import Sampler
from opsin.core.confidence import confidence_of
from opsin.core.errors import OpsinError
from opsin.core.request import Chunk, Embedding, ImageChunk, Prompt, SamplingParams, TextChunk, TokenizedPrompt
from opsin.engine.clock import StageClock, timings
from opsin.engine.draft import Drafter
from opsin.engine.labels import LEAST_COVERAGE, LabelTree
from opsin.engine.output import AnswerText
from opsin.engine.stream import AnswerStream

Limit = Literal["tokens", "seconds", "context", "guard"]


@dataclass(frozen=True, slots=True)
class Request:
    """One question.

    `max_tokens` is the limit in force, `deadline` the end of its time in seconds of the engine's clock. Higher
    `priority` goes first; within one, first come. Requests of different `salt` share nothing that is remembered.
    """

    prompt: Prompt
    params: SamplingParams
    max_tokens: int
    seed: int
    deadline: float | None = None
    priority: int = 0
    salt: str = ""
    number: int = 0


class State(enum.Enum):
    """A sequence scores labels or decodes, may go from any line to the last, and from those below back to the first."""

    WAITING = "waiting"
    PREFILL = "prefill"
    SCORE = "score"
    DECODE = "decode"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request; changed by the engine's thread alone once it was handed over.

    The prompt is read at a cursor: `chunk_index` names the chunk, `chunk_offset` the next token or row in it.

        chunks:      [ text 0 ........ ][ image 1 ........... ][ text 2 ... ]
        decoded:    ################   ######################  ###
        cursor:                                    chunk_index=2, chunk_offset=3

    `chunks` are those of `tokenized`, and after a preemption the tokens answered so far as one more. `n_pos` is the
    next free position, `n_cells` the KV cells it sees (they differ under M-RoPE), `cached` those it got from a prefix.
    `last_token` was sampled and not yet decoded. `forced` are tokens to take instead of sampling, `closing` those that
    close a reasoning block. `compiled` is its schema or grammar, ready for the sampler. `prefix` is its entry in the
    KV cache manager. `embeddings` are the known ones of its image chunks, by identity; `cached_images` had a chunk
    whose embedding was remembered, `encoded_images` one that was encoded for this request. `turn` orders who works on
    an image next. `drafter` guesses how its answer goes on. `labels` are to be scored now, `later` those behind its
    own words; with both, it says these only if it hardly begins with a label. `parked`: it waits in main memory.
    `weighed` are the tokens of an answer with `confidence`.
    """

    request: Request
    stream: AnswerStream
    clock: StageClock
    output: AnswerText
    tokenized: TokenizedPrompt
    embeddings: dict[str, Embedding] = field(default_factory=dict, repr=False)
    closing: tuple[int, ...] = ()
    compiled: object = None
    labels: LabelTree | None = None
    later: LabelTree | None = None
    chunks: list[Chunk] = field(init=False)
    prefix: Prefix = field(init=False)
    state: State = State.WAITING
    sampler: Sampler | None = None
    chunk_index: int = 0
    chunk_offset: int = 0
    n_pos: int = 0
    n_cells: int = 0
    cached: int = 0
    preemptions: int = 0
    parked: bool = False
    last_token: int = -1
    forced: list[int] = field(default_factory=list)
    drafter: Drafter | None = None
    cached_images: set[int] = field(default_factory=set)
    encoded_images: set[int] = field(default_factory=set)
    turn: int = 0
    finish_reason: FinishReason | None = None
    limit: Limit | None = None
    error: OpsinError | None = None
    weighed: list[TokenLogprob] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._read_chunks()

    def _read_chunks(self) -> None:
        self.chunks = [chunk for chunk in self.tokenized.chunks if chunk.n_tokens]
        if words := self.output.tokens[: None if self.labels is None else self.labels.behind]:
            self.chunks.append(TextChunk(tuple(words)))
        self.prefix = Prefix(units_of(self.chunks, self.request.salt))

    @property
    def seq_id(self) -> int:
        """The id of its cells in the KV cache, -1 for none."""
        return self.prefix.seq_id

    @property
    def chunk(self) -> Chunk | None:
        """The chunk at the cursor; None behind the last."""
        return self.chunks[self.chunk_index] if self.chunk_index < len(self.chunks) else None

    @property
    def embedding(self) -> Embedding | None:
        """The embedding of the image chunk at the cursor, when it is known."""
        chunk = self.chunk
        return self.embeddings.get(chunk.identity) if isinstance(chunk, ImageChunk) else None

    @property
    def to_fill(self) -> int:
        """Cells that the rest of the prompt will take."""
        return sum(chunk.n_tokens for chunk in self.chunks[self.chunk_index :]) - self.chunk_offset

    @property
    def images_ahead(self) -> list[ImageChunk]:
        """Image chunks from the cursor on."""
        return [chunk for chunk in self.chunks[self.chunk_index :] if isinstance(chunk, ImageChunk)]

    @property
    def to_encode(self) -> list[ImageChunk]:
        """Image chunks from the cursor on whose embeddings are not known."""
        return [chunk for chunk in self.images_ahead if chunk.identity not in self.embeddings]

    def start(self) -> None:
        """Begin behind the units of the prompt that are in the KV cache already."""
        ready = self.prefix.ready
        self.n_cells, self.n_pos = self.prefix.cells(ready), self.prefix.positions(ready)
        self.chunk_index, self.chunk_offset = 0, self.n_cells
        while self.chunk_offset >= self.chunks[self.chunk_index].n_tokens:  # at least one unit is left to be decoded
            self.chunk_offset -= self.chunks[self.chunk_index].n_tokens
            self.chunk_index += 1
        self.state, self.parked = State.PREFILL, False
        if self.preemptions == 0:
            self.cached = self.n_cells
            before = self.chunks[: self.chunk_index]
            self.cached_images |= {chunk.image for chunk in before if isinstance(chunk, ImageChunk)}

    def advance(self, tokens: int) -> None:
        """`tokens` more of the chunk at the cursor were decoded."""
        chunk = self.chunk
        assert chunk is not None
        self.chunk_offset += tokens
        self.n_cells += tokens
        whole = self.chunk_offset == chunk.n_tokens
        assert self.chunk_offset <= chunk.n_tokens, "the cursor left its chunk"
        if isinstance(chunk, TextChunk):
            self.prefix.ready += tokens
            self.n_pos += tokens
        elif whole:  # one unit: an image counts when it is whole
            self.prefix.ready += 1
            self.n_pos += chunk.n_pos
        if whole:
            self.chunk_index += 1
            self.chunk_offset = 0
            if self.chunk_index == len(self.chunks) and self.state is State.PREFILL:
                self.state = State.DECODE if self.labels is None else State.SCORE

    def decoded(self) -> None:
        """The last token sampled is in the KV cache now."""
        prefix = self.prefix
        prefix.units.append(self.last_token)
        prefix.ready += 1
        self.n_pos += 1
        self.n_cells += 1

    def take(self, token: int, logprob: TokenLogprob | None, *, ends_turn: bool) -> bool:
        """Take a sampled token in; False if it ends the answer, and so is not to be shown."""
        self.last_token = token
        if ends_turn and not self.request.params.ignore_eos:
            self.end("stop")
            return False
        if self.request.params.confidence and logprob is not None:
            self.weighed.append(logprob)
        self.output.take(token, None if self.request.params.logprobs is None else logprob)
        return True

    def next_phase(self) -> None:
        """Behind labels come its own words; behind these its labels are scored where the last one of them stands."""
        self.labels, self.later = (self.later, None) if self.labels is None else (None, self.later)
        if self.labels is not None and self.limit != "context":
            self.labels.behind = self.labels.named_last(self.output.tokens)
        self.preempt()

    def decide(self) -> None:
        """All labels are scored: the likeliest is the answer, unless its own words have to come before."""
        assert self.labels is not None
        choice = self.labels.decide(self.request.params.labels)
        if self.later is None or choice.coverage >= LEAST_COVERAGE:
            self.later = None
            for delta in self.output.write(choice.label, self.labels.likeliest(choice.label)):
                self.stream.add(delta)
        self.end("stop")

    def may_lag(self, n_ctx: int) -> bool:
        """Whether its next token may be computed before the last one is shown. The first is shown at once."""
        output = self.output
        return output.may_lag and 1 < len(output.tokens) < self.request.max_tokens and self.n_cells < n_ctx

    def show(self, token: int, piece: bytes, n_ctx: int) -> None:
        """Put what a token shows into the stream, and end the answer where a rule says so.

        `piece` are the token's bytes, `n_ctx` the cells that the KV cache holds of a sequence.
        """
        request, output = self.request, self.output
        for delta in output.read(token, piece):
            self.stream.add(delta)
        if output.stopped is not None:
            self.end("stop")
        elif output.verdict is not None:
            self.end("length", "guard")
        elif len(output.tokens) >= request.max_tokens:
            self.end("length", "tokens")
        elif self.n_cells >= n_ctx:
            self.end("length", "context")
        else:
            self.limit_reasoning()

    def limit_reasoning(self) -> None:
        """Close a reasoning block whose budget is spent; a budget of 0 closes one that the prompt opened."""
        budget, output = self.request.params.max_thinking_tokens, self.output
        if budget is not None and output.thinking and output.reasoning_tokens == budget:
            self.forced = list(self.closing)

    def is_late(self, now: float) -> bool:
        """Whether its time is over; what it has so far is kept."""
        return self.request.deadline is not None and now >= self.request.deadline

    def preempt(self) -> None:
        """Its cells are needed elsewhere: it waits again, with what it answered so far as a part of its prompt."""
        self.clock.leave()
        self.clock.switch(Stage.QUEUE)
        self._read_chunks()
        self.chunk_index = self.chunk_offset = 0
        self.state = State.WAITING
        self.preemptions += 1

    def drop_pixels(self) -> None:
        """When all images are encoded nobody needs their pixels: with 12 megapixels each they fill the memory.

        Those that the KV cache alone knows may have to be encoded after all, when the sequence is put back.
        """
        images = [chunk for chunk in self.chunks if isinstance(chunk, ImageChunk)]
        if self.request.prompt.parts and all(chunk.identity in self.embeddings for chunk in images):
            self.tokenized.close()
            self.request = replace(self.request, prompt=replace(self.request.prompt, parts=()))

    def end(self, reason: FinishReason, limit: Limit | None = None) -> None:
        """The answer ends here; the first reason counts."""
        if self.state is not State.DONE:
            self.state, self.finish_reason, self.limit = State.DONE, reason, limit

    def end_with(self, error: OpsinError) -> None:
        """It failed by itself, in the middle of a step: it is freed behind that, and its reader told."""
        self.error = error
        self.end("cancelled")

    def answer(self) -> Answer:
        """The whole answer, with the account of its time; called once, at the end."""
        assert self.finish_reason is not None
        stages, output, tokenized, request = self.clock.freeze(), self.output, self.tokenized, self.request
        usage = Usage(tokenized.n_tokens, len(output.tokens), tokenized.n_image_tokens, self.cached)
        remembered = self.cached_images - self.encoded_images
        # Of merged frames the first is counted.
        merged = [chunk for chunk in tokenized.chunks if isinstance(chunk, ImageChunk) and chunk.image in remembered]
        remembered |= {chunk.image + chunk.frames - 1 for chunk in merged}
        return Answer(
            text=output.text,
            reasoning=output.reasoning,
            finish_reason=self.finish_reason,
            usage=usage,
            stages=stages,
            timings=timings(
                stages,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                predicted_tokens=usage.completion_tokens,
                drafter=self.drafter,
            ),
            images=tuple(replace(image, cached=i in remembered) for i, image in enumerate(tokenized.images)),
            guard=output.verdict,
            limit=self.limit,
            logprobs=tuple(output.logprobs),
            tokens=tuple(output.tokens),
            max_tokens=request.max_tokens,
            intervals=self.clock.intervals(),
            stop=None if request.params.labels else output.stopped,
            confidence=confidence_of(output.text, self.weighed) if request.params.confidence else None,
            choice=None if self.labels is None else self.labels.choice,
        )
