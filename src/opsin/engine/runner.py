"""Carries plans out on a backend, and gives each stage its time. Decides nothing about order or ends.

A native stage ends after `synchronize`: on a GPU `decode` returns before the work is done, and without that the time
of prefill and decode would be found in whichever call reads the logits next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opsin.cache import PictureCache, salted
from opsin.core.answer import Progress, TokenLogprob
from opsin.core.backend import Backend, EmbeddingRows, TokenRow
from opsin.core.layout import ImageRun
from opsin.core.sampling import SamplingParams
from opsin.core.stages import Stage
from opsin.engine.native_calls import Watch, unwatched
from opsin.engine.plan import Encode, Forget, Fork, Join, Leave, MemoryOp, PrefillImage, Step, Tokens
from opsin.engine.sequence import Sequence, State


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token drawn for a sequence."""

    token: int
    logprob: TokenLogprob | None


class Runner:
    """Owns the way to the backend; used by the engine's thread alone.

    `rest` is the stage of a sequence that the engine is not computing for: QUEUE while others are computed for.
    """

    def __init__(self, backend: Backend, pictures: PictureCache, watch: Watch = unwatched) -> None:
        self._backend = backend
        self._watch = watch
        self._pictures = pictures
        self.rest = Stage.OTHER
        self.encodes = 0

    def remember(self, operations: Iterable[MemoryOp]) -> None:
        """Carry memory operations out, in order."""
        for operation in operations:
            match operation:
                case Forget():
                    self._backend.kv_remove(operation.seq_id, operation.start, -1)
                case Fork():
                    self._backend.kv_copy(operation.source, operation.target, 0, operation.end)
                case Join():
                    self._backend.kv_join(operation.seq_id)
                case Leave():
                    self._backend.kv_leave(operation.seq_id)

    def begin(self, sequence: Sequence) -> None:
        """An admitted sequence gets its sampler, and keeps it over preemptions. Raises BadGrammar."""
        if sequence.sampler is None:
            sequence.sampler = self._backend.sampler(self._params(sequence), sequence.request.seed)

    def end(self, sequence: Sequence) -> None:
        """Give back what an ended sequence holds beside its cells."""
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None
        sequence.embedding = None
        sequence.layout.close()

    def run(self, step: Step, between: Callable[[], None] | None = None) -> bool:
        """Compute a step; tokens are drawn apart. False: no room in the KV memory, and nothing changed.

        `between` is called while a picture is encoded. Raises EncodeFailed or DecodeFailed.
        """
        if isinstance(step, Encode):
            self._encode(step, between)
            return True
        if isinstance(step, PrefillImage):
            return self._prefill_image(step)
        return self._tokens(step)

    @staticmethod
    def drawing(step: Step) -> Iterator[tuple[Sequence, int]]:
        """Who gets a token from the logits that the step computed, and from which row of its batch."""
        if isinstance(step, PrefillImage) and step.last:
            yield step.sequence, step.stop - step.start - 1
        elif isinstance(step, Tokens):
            for row, sequence in enumerate(step.decode):
                yield sequence, row
            row = len(step.decode) - 1
            for part in step.prefill:
                row += len(part.tokens)
                if part.last:
                    yield part.sequence, row

    def draw(self, sequence: Sequence, row: int) -> Drawn:
        """Draw a token. Raises BadGrammar or DecodeFailed, which are this sequence's own."""
        with sequence.clock.stage(Stage.SAMPLE):
            if sequence.forced:
                token = sequence.forced.pop(0)
            else:
                assert sequence.sampler is not None, "a running sequence has a sampler"
                token = sequence.sampler.sample(row)
            top = sequence.request.params.logprobs
            logprob = None if top is None else self._backend.logprobs(row, token, top)
        return Drawn(token, logprob)

    def leave_reasoning(self, sequence: Sequence) -> None:
        """The answer begins: from here on the grammar holds."""
        params = sequence.request.params
        if sequence.sampler is not None and (params.grammar or params.json_schema):
            sequence.sampler.close()
            sequence.sampler = self._backend.sampler(params, sequence.request.seed)

    def last_position(self, seq_id: int) -> int:
        """What the backend itself says of a sequence."""
        return self._backend.kv_last(seq_id)

    @staticmethod
    def _params(sequence: Sequence) -> SamplingParams:
        # A schema describes the answer, not the reasoning before it.
        params = sequence.request.params
        if not sequence.output.thinking:
            return params
        return params.model_copy(update={"json_schema": None, "grammar": None})

    def _encode(self, step: Encode, between: Callable[[], None] | None) -> None:
        sequence, run = step.sequence, step.run
        identity = salted(run.identity, sequence.request.salt)
        sequence.embedding = self._pictures.get(identity)
        if sequence.embedding is not None:
            sequence.known_pictures.add(run.picture)
            return
        if run.placeholder:
            # The embedding was known when the prompt was laid out, and was evicted since: rare, so it may take time.
            prompt = sequence.request.prompt
            with self._stage((sequence,), Stage.PREPROCESS):
                sequence.adopt(self._backend.layout(prompt.parts, add_bos=prompt.add_bos))
            again = sequence.run
            assert isinstance(again, ImageRun), "the same prompt has the same runs"
            run = again
        sequence.stream.deliver(Progress(f"reading picture {run.picture + 1} of {len(sequence.layout.images)}"))
        batch = [(sequence, run), *self._unknown(step)]
        pictures = tuple(owner.layout.images[chunk.picture].sha256 for owner, chunk in batch)
        with self._stage({id(s): s for s, _ in batch}.values(), Stage.ENCODE), self._watch(pictures):
            if len(batch) > 1:
                embeddings = self._backend.encode_many([chunk for _, chunk in batch])
            else:
                embeddings = [self._backend.encode(run, between)]
        for (owner, chunk), embedding in zip(batch, embeddings, strict=True):
            self.encodes += 1
            owner.encoded_pictures.add(chunk.picture)
            # Also where its client has left: the work is done, and the next one who asks has it for nothing.
            self._pictures.put(salted(chunk.identity, owner.request.salt), embedding)
        sequence.embedding = embeddings[0]

    def _unknown(self, step: Encode) -> list[tuple[Sequence, ImageRun]]:
        """Chunks beside that have pixels and are not known, each once.

        Since the plan was made an owner may have ended, and its own prompt may have been laid out again: closed chunks.
        """
        seen = {salted(step.run.identity, step.sequence.request.salt)}
        unknown = []
        for owner, chunk in step.beside:
            identity = salted(chunk.identity, owner.request.salt)
            if owner.state is State.DONE or owner.stream.cancelled or not any(run is chunk for run in owner.runs):
                continue
            if not (chunk.placeholder or identity in seen or self._pictures.knows(identity)):
                seen.add(identity)
                unknown.append((owner, chunk))
        return unknown

    def _prefill_image(self, step: PrefillImage) -> bool:
        sequence = step.sequence
        assert sequence.embedding is not None, "a picture is encoded before it is prefilled"
        rows = EmbeddingRows(
            rows=sequence.embedding[step.start : step.stop],
            positions=step.run.positions_at(sequence.n_pos, step.start, step.stop),
            seq_id=sequence.seq_id,
            logits=step.last,
            causal=step.run.causal,
        )
        picture = sequence.layout.images[step.run.picture].sha256
        with self._stage((sequence,), Stage.IMAGE_PREFILL), self._watch((picture,)):
            return self._decode(rows)

    def _tokens(self, step: Tokens) -> bool:
        rows = [TokenRow(s.last_token, s.n_pos, s.seq_id, logits=True) for s in step.decode]
        for part in step.prefill:
            sequence, final = part.sequence, len(part.tokens) - 1
            rows += [
                TokenRow(token, sequence.n_pos + i, sequence.seq_id, logits=part.last and i == final)
                for i, token in enumerate(part.tokens)
            ]
        filling = tuple(part.sequence for part in step.prefill)
        with self._stage(step.decode, Stage.DECODE), self._stage(filling, Stage.TEXT_PREFILL), self._watch(()):
            return self._decode(rows)

    def _decode(self, rows: list[TokenRow] | EmbeddingRows) -> bool:
        if not self._backend.decode(rows):
            return False
        self._backend.synchronize()
        return True

    @contextmanager
    def _stage(self, sequences: Iterable[Sequence], which: Stage) -> Iterator[None]:
        """Give the time of a block to one stage of each of these sequences."""
        for sequence in sequences:
            sequence.clock.switch(which)
        try:
            yield
        finally:
            for sequence in sequences:
                sequence.clock.switch(self.rest)
