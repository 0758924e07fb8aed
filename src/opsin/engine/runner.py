"""Carries plans out on a backend, and gives each stage its time. Decides nothing about order or ends.

A native stage ends after `synchronize`: on a GPU `decode` returns before the work is done, and without that the time
of prefill and decode would be found in whichever call reads the logits next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from opsin.cache import EmbeddingCache, salted
from opsin.core.answer import Progress, Stage, TokenLogprob
from opsin.core.backend import Backend, Sampler
from opsin.core.errors import DecodeFailed, OpsinError
from opsin.core.request import EmbeddingRows, ImageChunk, SamplingParams, TokenBatch
from opsin.engine.clock import GroupClock, Now
from opsin.engine.native_calls import Watch, unwatched
from opsin.engine.plan import Encode, Fork, KVOp, PrefillImage, Step, Tokens
from opsin.engine.sequence import Sequence, State

Sampled = tuple[Sequence, int, TokenLogprob | None]


class PixelsNeeded(Exception):
    """An image was left without pixels since another request was to encode it, and that one did not."""


class Runner:
    """Owns the way to the backend; used by the engine's thread alone.

    `group` is the clock of those that decode. While nothing is computed for them `group_idle` is their stage, and
    `idle_stage` that of all others. `now` is when the last stage ended, in seconds of the engine's clock.
    """

    def __init__(
        self, backend: Backend, images: EmbeddingCache, clock: Now = time.perf_counter, watch: Watch = unwatched
    ) -> None:
        self._backend = backend
        self._images = images
        self._clock = clock
        self._watch = watch
        self.group = GroupClock(clock)
        self.idle_stage = self.group_idle = Stage.OTHER
        self.now = clock()
        self.encodes = 0

    def apply_kv_ops(self, operations: Iterable[KVOp]) -> dict[int, OpsinError]:
        """Carry KV cache operations out, in order; gives what failed, by the id of the sequence it was for."""
        failed: dict[int, OpsinError] = {}
        for operation in operations:
            seq_id = operation.target if isinstance(operation, Fork) else operation.seq_id
            try:
                if isinstance(operation, Fork):
                    self._backend.kv_copy(operation.source, operation.target, 0, operation.end)
                elif not self._backend.kv_remove(seq_id, 0, -1):
                    raise DecodeFailed(f"The KV cache cannot forget sequence {seq_id}: load the model again.")
            except OpsinError as error:
                failed[seq_id] = error
        return failed

    def begin(self, sequence: Sequence) -> None:
        """An admitted sequence gets its sampler, and keeps it over preemptions. Raises BadGrammar."""
        if sequence.sampler is None:
            sequence.sampler = self._backend.sampler(_params(sequence), sequence.request.seed)

    def end(self, sequence: Sequence) -> None:
        """Give back what an ended sequence holds beside its cells."""
        sequence.clock.leave()
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None
        sequence.embeddings.clear()
        sequence.tokenized.close()

    def run(self, step: Step, between: Callable[[], None] | None = None) -> bool:
        """Compute a step; tokens are sampled apart. False: no room in the KV cache, and nothing changed.

        `between` is called while an image is encoded. Raises EncodeFailed, DecodeFailed or PixelsNeeded.
        """
        if isinstance(step, Tokens):
            return self._tokens(step)
        if isinstance(step, PrefillImage):
            return self._prefill_image(step)
        self._encode(step, between)
        return True

    def sample(self, step: Step) -> list[Sampled]:
        """Sample a token for everyone whose logits the step computed. Who fails ends alone, with its error."""
        rows = _rows(step)
        if not rows:
            return []
        # Those that decoded share the group's clock; the others get their first token.
        first = [s for s, _ in (rows[len(step.decode) :] if isinstance(step, Tokens) else rows)]
        self._switch(first, Stage.SAMPLE, self.now)
        wanted: list[tuple[Sampler, int, int | None]] = []
        tokens: list[Sampled] = []
        sampling: list[Sequence] = []
        for sequence, row in rows:
            top = sequence.request.params.logprobs
            if sequence.forced:
                token = sequence.forced.pop(0)
                tokens.append((sequence, token, None if top is None else self._backend.logprobs(row, token, top)))
            else:
                assert sequence.sampler is not None, "a running sequence has a sampler"
                wanted.append((sequence.sampler, row, top))
                sampling.append(sequence)
        for sequence, result in zip(sampling, self._backend.sample(wanted), strict=True):
            if isinstance(result, OpsinError):
                sequence.error = result
                sequence.end("cancelled")
            else:
                tokens.append((sequence, *result))
        self.now = self._clock()
        self._switch(first, Stage.DETOKENIZE, self.now)
        return tokens

    def settled(self, step: Step) -> None:
        """The step's output is processed: its stages end, and whoever answers from here on joins the group."""
        self.now = now = self._clock()
        self.group.switch(self.group_idle, now)
        others = step.prefill if isinstance(step, Tokens) else (step,)
        for sequence in [part.sequence for part in others]:
            if sequence.state is State.DECODE:
                sequence.clock.join(self.group)
            else:
                sequence.clock.switch(self.idle_stage, now)

    def leave_reasoning(self, sequence: Sequence) -> None:
        """The answer begins: from here on the constraint holds."""
        params = sequence.request.params
        if sequence.sampler is not None and (params.grammar or params.json_schema):
            sequence.sampler.close()
            sequence.sampler = self._backend.sampler(params, sequence.request.seed)

    def last_position(self, seq_id: int) -> int:
        """What the backend itself says of a sequence."""
        return self._backend.kv_last(seq_id)

    def _switch(self, first: list[Sequence], stage: Stage, now: float) -> None:
        self.group.switch(stage, now)
        for sequence in first:
            sequence.clock.switch(stage, now)

    def _encode(self, step: Encode, between: Callable[[], None] | None) -> None:
        sequence, chunk = step.sequence, step.chunk
        embedding = self._images.in_memory(salted(chunk.identity, sequence.request.salt))
        if embedding is not None:
            sequence.embeddings[chunk.identity] = embedding
            sequence.cached_images.add(chunk.image)
            return
        if chunk.placeholder:
            raise PixelsNeeded
        sequence.stream.deliver(Progress(f"reading image {chunk.image + 1} of {len(sequence.tokenized.images)}"))
        batch = [(sequence, chunk), *self._unknown(step)]
        owners = list({id(owner): owner for owner, _ in batch}.values())
        self._begin_stage(owners, Stage.ENCODE, Stage.QUEUE)
        try:
            with self._watch(tuple(_sha256(owner, chunk) for owner, chunk in batch)):
                if len(batch) > 1:
                    embeddings = self._backend.encode_many([chunk for _, chunk in batch])
                else:
                    embeddings = [self._backend.encode(chunk, between)]
        finally:
            self._end_stage(owners)
        for (owner, chunk), embedding in zip(batch, embeddings, strict=True):
            self.encodes += 1
            owner.encoded_images.add(chunk.image)
            owner.embeddings[chunk.identity] = embedding
            self._images.put(salted(chunk.identity, owner.request.salt), embedding)

    def _unknown(self, step: Encode) -> list[tuple[Sequence, ImageChunk]]:
        """The chunks beside it that have pixels and no known embedding, each once.

        Since the plan was made an owner may have ended and closed its chunks.
        """
        seen = {salted(step.chunk.identity, step.sequence.request.salt)}
        unknown = []
        for owner, chunk in step.beside:
            identity = salted(chunk.identity, owner.request.salt)
            if owner.state is State.DONE or owner.stream.done or chunk.placeholder or identity in seen:
                continue
            if self._images.in_memory(identity) is None:
                seen.add(identity)
                unknown.append((owner, chunk))
        return unknown

    def _prefill_image(self, step: PrefillImage) -> bool:
        sequence = step.sequence
        embedding = sequence.embedding
        assert embedding is not None, "an image is encoded before it is prefilled"
        rows = EmbeddingRows(
            rows=embedding[step.start : step.stop],
            positions=step.chunk.positions_at(sequence.n_pos, step.start, step.stop),
            seq_id=sequence.seq_id,
            logits=step.last,
            causal=step.chunk.causal,
        )
        images = (_sha256(sequence, step.chunk),)
        return self._decode(rows, [sequence], Stage.IMAGE_PREFILL, Stage.QUEUE, images)

    def _tokens(self, step: Tokens) -> bool:
        decode = step.decode
        batch = TokenBatch(
            [s.last_token for s in decode],
            [s.n_pos for s in decode],
            [s.prefix.seq_id for s in decode],
            list(range(len(decode))),
        )
        for part in step.prefill:
            sequence = part.sequence
            batch.append(part.tokens, sequence.n_pos, sequence.seq_id, logits=part.last)
        filling = [part.sequence for part in step.prefill]
        return self._decode(batch, filling, Stage.TEXT_PREFILL, Stage.DECODE if decode else Stage.QUEUE)

    def _decode(
        self,
        rows: TokenBatch | EmbeddingRows,
        filling: list[Sequence],
        own: Stage,
        group: Stage,
        images: tuple[str, ...] = (),
    ) -> bool:
        self._begin_stage(filling, own, group)
        try:
            with self._watch(images):
                done = self._backend.decode(rows)
                if done:
                    self._backend.synchronize()
        finally:
            self._end_stage(filling)
        return done

    def _begin_stage(self, sequences: Iterable[Sequence], own: Stage, group: Stage) -> None:
        now = self._clock()
        self.group.switch(group, now)
        for sequence in sequences:
            sequence.clock.switch(own, now)

    def _end_stage(self, sequences: Iterable[Sequence]) -> None:
        self.now = now = self._clock()
        self.group.switch(self.group_idle, now)
        for sequence in sequences:
            sequence.clock.switch(self.idle_stage, now)


def _rows(step: Step) -> list[tuple[Sequence, int]]:
    """Who gets a token from the logits that the step computed, and from which row of its batch."""
    if isinstance(step, PrefillImage):
        return [(step.sequence, step.stop - step.start - 1)] if step.last else []
    if not isinstance(step, Tokens):
        return []
    rows = [(sequence, row) for row, sequence in enumerate(step.decode)]
    row = len(step.decode) - 1
    for part in step.prefill:
        row += len(part.tokens)
        if part.last:
            rows.append((part.sequence, row))
    return rows


def _sha256(sequence: Sequence, chunk: ImageChunk) -> str:
    return sequence.tokenized.images[chunk.image].sha256


def _params(sequence: Sequence) -> SamplingParams:
    """A schema describes the answer, not the reasoning before it."""
    params = sequence.request.params
    if not sequence.output.thinking:
        return params
    return params.model_copy(update={"json_schema": None, "grammar": None})
