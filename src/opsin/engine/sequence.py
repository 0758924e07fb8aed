"""One request on its way: where its prompt stands, what it answered, and why it ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Literal

from opsin.cache.prefix import Prefix, cells_of, positions_of, unit_of, units_of
from opsin.core.answer import Answer, FinishReason, Usage
from opsin.core.backend import Sampler
from opsin.core.errors import OpsinError
from opsin.core.request import Chunk, Embedding, ImageChunk, TextChunk, TokenizedPrompt
from opsin.engine.clock import StageClock, timings
from opsin.engine.output import AnswerText
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
    """The state of one request; changed by the engine's thread alone once it was handed over.

    The prompt is read at a cursor: `chunk_index` names the chunk, `chunk_offset` the next token or row in it.

        chunks:      [ text 0 ........ ][ image 1 ........... ][ text 2 ... ]
        decoded:    ################   ######################  ###
        cursor:                                    chunk_index=2, chunk_offset=3

    `chunks` are those of `tokenized`, and after a preemption the tokens answered so far as one more. `n_pos` is the
    next free position, `n_cells` the KV cells it sees (they differ under M-RoPE), `cached` those it got from a prefix.
    `last_token` was sampled and not yet decoded. `forced` are tokens to take instead of sampling. `prefix` is its entry
    in the KV cache manager, whose units grow with the cursor. `embeddings` are the known ones of its image chunks,
    by identity; `cached_images` had a chunk whose embedding was remembered, `encoded_images` one that was encoded for
    this request. `turn` orders who works on an image next.
    """

    request: Request
    stream: AnswerStream
    clock: StageClock
    output: AnswerText
    tokenized: TokenizedPrompt
    embeddings: dict[str, Embedding] = field(default_factory=dict, repr=False)
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
    last_token: int = -1
    forced: list[int] = field(default_factory=list)
    cached_images: set[int] = field(default_factory=set)
    encoded_images: set[int] = field(default_factory=set)
    turn: int = 0
    finish_reason: FinishReason | None = None
    limit: Limit | None = None
    error: OpsinError | None = None

    def __post_init__(self) -> None:
        self._read_chunks()

    def _read_chunks(self) -> None:
        self.chunks = [chunk for chunk in self.tokenized.chunks if chunk.n_tokens]
        if self.output.tokens:
            self.chunks.append(TextChunk(tuple(self.output.tokens)))
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
    def at_image(self) -> bool:
        """Whether the chunk at the cursor is an image chunk."""
        return isinstance(self.chunk, ImageChunk)

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
    def to_encode(self) -> list[ImageChunk]:
        """Image chunks from the cursor on whose embeddings are not known."""
        coming = self.chunks[self.chunk_index :]
        return [chunk for chunk in coming if isinstance(chunk, ImageChunk) and chunk.identity not in self.embeddings]

    def inside_image(self, image: int) -> bool:
        """Whether chunks of this image are still to come."""
        return any(isinstance(chunk, ImageChunk) and chunk.image == image for chunk in self.chunks[self.chunk_index :])

    def start(self) -> None:
        """Begin behind the units of the prompt that are in the KV cache already."""
        shared = self.prefix.units
        self.n_cells, self.n_pos = cells_of(shared), positions_of(shared)
        self.chunk_index, self.chunk_offset = self._locate(self.n_cells)
        self.state = State.PREFILL
        if self.preemptions == 0:
            self.cached = self.n_cells
            self.cached_images |= {
                chunk.image for chunk in self.chunks[: self.chunk_index] if isinstance(chunk, ImageChunk)
            }

    def _locate(self, cells: int) -> tuple[int, int]:
        for index, chunk in enumerate(self.chunks):
            if cells < chunk.n_tokens:
                return index, cells
            cells -= chunk.n_tokens
        raise AssertionError("at least one unit of a prompt is decoded")

    def advance(self, tokens: int) -> None:
        """`tokens` more of the chunk at the cursor were decoded."""
        chunk = self.chunk
        assert chunk is not None
        before = self.chunk_offset
        self.chunk_offset += tokens
        self.n_cells += tokens
        assert self.chunk_offset <= chunk.n_tokens, "the cursor left its chunk"
        if isinstance(chunk, TextChunk):
            self.prefix.units.extend(chunk.tokens[before : self.chunk_offset])
            self.n_pos += tokens
        if self.chunk_offset == chunk.n_tokens:
            if isinstance(chunk, ImageChunk):
                # One unit: an image counts when it is whole.
                self.prefix.units.append(unit_of(chunk))
                self.n_pos += chunk.n_pos
            self.chunk_index += 1
            self.chunk_offset = 0
        if self.chunk is None:
            self.state = State.DECODE

    def decoded(self) -> None:
        """The last token sampled is in the KV cache now."""
        self.prefix.units.append(self.last_token)
        self.n_pos += 1
        self.n_cells += 1

    def preempt(self) -> None:
        """Its cells are needed elsewhere: it waits again, with what it answered so far as a part of its prompt."""
        self.clock.leave()
        self._read_chunks()
        self.chunk_index = self.chunk_offset = 0
        self.state = State.WAITING
        self.preemptions += 1

    def adopt(self, tokenized: TokenizedPrompt) -> None:
        """Take the same prompt tokenized anew, and close the old one; for a sequence that waits."""
        self.tokenized.close()
        self.tokenized = tokenized
        self._read_chunks()

    def drop_pixels(self) -> None:
        """All embeddings are known: neither the images nor what was preprocessed of them is needed any more."""
        self.tokenized.close()
        self.request = replace(self.request, prompt=replace(self.request.prompt, parts=()))

    def end(self, reason: FinishReason, limit: Limit | None = None) -> None:
        """The answer ends here; the first reason counts."""
        if self.state is not State.DONE:
            self.state, self.finish_reason, self.limit = State.DONE, reason, limit

    def answer(self) -> Answer:
        """The whole answer, with the account of its time; called once, at the end."""
        assert self.finish_reason is not None
        stages = self.clock.freeze()
        usage = Usage(
            prompt_tokens=self.tokenized.n_tokens,
            completion_tokens=len(self.output.tokens),
            image_tokens=self.tokenized.n_image_tokens,
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
                for index, image in enumerate(self.tokenized.images)
            ),
            guard=self.output.verdict,
            limit=self.limit,
            logprobs=tuple(self.output.logprobs),
            tokens=tuple(self.output.tokens),
            max_tokens=self.request.max_tokens,
            intervals=self.clock.intervals(),
        )
