"""One request: what its caller reads, where its prompt stands, what it answered, and why it ended."""

from __future__ import annotations

import asyncio
import enum
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from opsin.cache import Prefix, units_of
from opsin.core.answer import Answer, Event, Finished, FinishReason, TokenLogprob, Usage
from opsin.core.backend import Sampler
from opsin.core.errors import Cancelled, OpsinError, copy_of
from opsin.core.request import Chunk, Embedding, ImageChunk, Prompt, SamplingParams, TextChunk, TokenizedPrompt
from opsin.engine.clock import StageClock, timings
from opsin.engine.draft import Drafter
from opsin.engine.output import AnswerText

MAX_UNREAD = 8192
"""Events that may wait for their reader."""

Limit = Literal["tokens", "seconds", "context", "guard"]


class AnswerStream:
    """The events of one answer, read by one reader: `for` in plain code, `async for` on an event loop.

    Delivery never blocks the engine. The stream ends after `Finished`, or raises the request's error. `on_cancel` and
    `on_end` are called once, when the reader goes away and when the last event is in. `wake` tells readers of several
    streams that there is something to read. `done` is True once the last event or the error is in.
    """

    def __init__(self, on_cancel: Callable[[], None], wake: Wake | None = None) -> None:
        self._on_cancel = on_cancel
        self._wake = wake or wake_readers
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._waiting = False
        self.on_end: Callable[[], None] | None = None
        self.done = self.cancelled = False
        self.only_end = False  # its reader waits for the whole answer
        self.reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def add(self, event: Event) -> None:
        """Put an event in without waking the reader: the engine wakes the readers of a whole step at once."""
        if self.done:
            return
        if isinstance(event, Finished):
            self._events.append(event)
            self._end(None)
        elif not self.only_end:
            self._events.append(event)
            if len(self._events) > MAX_UNREAD:
                # Nobody reads: the answer ends here, and its memory is for others.
                self.cancelled = True
                self._end(Cancelled(f"The reader is {MAX_UNREAD} events behind: the answer was cut."))

    def deliver(self, event: Event) -> None:
        """Hand one event over."""
        self.add(event)
        self._wake((self,))

    def fail(self, error: BaseException) -> None:
        """End the stream with an error; the first end counts."""
        self._end(error)
        self._wake((self,))

    def cancel(self) -> None:
        """Go away: the engine frees the sequence within one step."""
        self.cancelled = True
        self.fail(Cancelled("The answer was cancelled."))
        self._on_cancel()

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            if self.done:
                return
            self._error, self.done = error, True
            on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()

    def notify(self) -> None:
        """Wake a reader that waits in a thread."""
        # The reader sets the flag before it looks for events a last time, so none is missed.
        if self._waiting and (self.done or not self.only_end):
            with self._changed:
                self._changed.notify_all()

    def read_with(self, loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
        """From now on `ready` is set, in that loop, whenever something can be taken: for a reader of many streams."""
        self.reader = (loop, ready)
        if self._events or self.done:
            ready.set()

    def take(self) -> tuple[list[Event], BaseException | None]:
        """What has come since the last time, without waiting, and the error that the stream has ended with."""
        return [self._events.popleft() for _ in range(len(self._events))], self._error

    def _raise(self) -> None:
        """All is read: raise the error, if that is how it ended."""
        # What is raised holds the frames it went through, and they hold this stream and the reader's images. Kept here,
        # it would close a ring that only a full garbage collection opens, after megabytes of them.
        error, self._error = self._error, copy_of(self._error) if self._error is not None else None
        try:
            if error is not None:
                raise error
        finally:
            del error

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, waiting in this thread."""
        while True:
            done = self.done  # asked first, so that what was put in just before the end is read
            while self._events:
                yield self._events.popleft()
            if done:
                self._raise()
                return
            with self._changed:
                self._waiting = True
                self._changed.wait_for(lambda: self._events or self.done)
                self._waiting = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events as they come, without blocking the running loop; leaving early cancels."""
        ready = asyncio.Event()
        self.reader = (asyncio.get_running_loop(), ready)
        try:
            while True:
                ready.clear()
                done = self.done
                while self._events:
                    yield self._events.popleft()
                if done:
                    self._raise()
                    return
                await ready.wait()
        finally:
            self.reader = None
            if not self.done:
                self.cancel()

    def result(self) -> Answer:
        """Wait for the whole answer. Raises the request's error."""
        self.only_end = True
        for event in self:
            if isinstance(event, Finished):
                return event.answer
        raise Cancelled("The answer was already read.")

    async def answer(self) -> Answer:
        """Wait for the whole answer without blocking the loop. Raises the request's error."""
        self.only_end = True
        async for event in self:
            if isinstance(event, Finished):
                return event.answer
        raise Cancelled("The answer was already read.")


Wake = Callable[[Iterable[AnswerStream]], None]
"""Called once a step with the streams that got events."""


def wake_readers(streams: Iterable[AnswerStream]) -> None:
    """Tell the readers of these streams that there is something to read, each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[AnswerStream]] = {}
    for stream in streams:
        if stream.reader is None:
            stream.notify()
        elif stream.done or not stream.only_end:
            by_loop.setdefault(stream.reader[0], []).append(stream)
    for loop, readers in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_all, readers)
        except RuntimeError:  # the loop was closed under its readers: that is leaving, and not this thread's fault
            for stream in readers:
                stream.reader, stream.cancelled = None, True
                stream.fail(Cancelled("The event loop of the answer's reader was closed."))


def _set_all(streams: Iterable[AnswerStream]) -> None:
    for stream in streams:
        if stream.reader is not None:
            stream.reader[1].set()


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
    `last_token` was sampled and not yet decoded. `forced` are tokens to take instead of sampling, `closing` those that
    close a reasoning block. `compiled` is its schema or grammar, ready for the sampler. `prefix` is its entry in the
    KV cache manager. `embeddings` are the known ones of its image chunks, by identity; `cached_images` had a chunk
    whose embedding was remembered, `encoded_images` one that was encoded for this request. `turn` orders who works on
    an image next. `drafter` guesses how its answer goes on.
    """

    request: Request
    stream: AnswerStream
    clock: StageClock
    output: AnswerText
    tokenized: TokenizedPrompt
    embeddings: dict[str, Embedding] = field(default_factory=dict, repr=False)
    closing: tuple[int, ...] = ()
    compiled: object = None
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
    drafter: Drafter | None = None
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
        self.state = State.PREFILL
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
                self.state = State.DECODE

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
        self.output.take(token, logprob)
        return True

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
        self._read_chunks()
        self.chunk_index = self.chunk_offset = 0
        self.state = State.WAITING
        self.preemptions += 1

    def drop_pixels(self) -> None:
        """When all images are encoded nobody needs their pixels: with 12 megapixels each they fill the memory."""
        if self.request.prompt.parts and not self.to_encode:
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
        stages, output, tokenized = self.clock.freeze(), self.output, self.tokenized
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
            max_tokens=self.request.max_tokens,
            intervals=self.clock.intervals(),
            stop=output.stopped,
        )
