"""Carries plans out on a backend, and gives each stage its time. Decides nothing about order or ends.

A native stage ends after `synchronize`: on a GPU `decode` returns before the work is done, and without that the time
of prefill and decode would be found in whichever call reads the logits next.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opsin.cache import EmbeddingCache, salted
from opsin.cache.kv_cache import Fork, KVOp, SwapIn, SwapOut
from opsin.core.answer import Progress, Stage, TokenLogprob
from opsin.core.backend import Backend, Sampler
from opsin.core.errors import DecodeFailed, OpsinError
from opsin.core.request import EmbeddingRows, ImageChunk, TokenBatch
from opsin.engine.clock import GroupClock, Now
from opsin.engine.request import Sequence, State
from opsin.engine.step import Encode, PrefillImage, Step, Tokens, branch_rows, cells_needed

Sampled = tuple[Sequence, int, TokenLogprob | None]

Watch = Callable[[tuple[str, ...]], AbstractContextManager[None]]
"""Entered around a native call, with the `sha256` of the images that it works on (none: it works on text). Calls may be
nested, and come from the engine's thread and from those that preprocess images."""

_NOTHING = nullcontext()


def unwatched(_: tuple[str, ...]) -> AbstractContextManager[None]:
    """Nobody wants to know of native calls."""
    return _NOTHING


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
            seq_id = operation.seq_id
            try:
                if isinstance(operation, Fork):
                    self._backend.kv_copy(operation.source, seq_id, 0, operation.end)
                elif isinstance(operation, SwapIn):
                    self._backend.kv_load(seq_id, operation.source.saved)
                    self._forget(seq_id, operation.end)
                else:
                    if isinstance(operation, SwapOut):
                        operation.prefix.saved = self._backend.kv_save(seq_id)
                    self._forget(seq_id, 0)
            except OpsinError as error:
                failed[seq_id] = error
        return failed

    def _forget(self, seq_id: int, start: int) -> None:
        if not self._backend.kv_remove(seq_id, start, -1):
            raise DecodeFailed(f"The KV cache cannot forget sequence {seq_id}: load the model again.")

    def check(self, positions: dict[int, int]) -> None:
        """The backend holds what was counted: the last position of each sequence, by id. Raises AssertionError."""
        for seq_id, expected in positions.items():
            last = self._backend.kv_last(seq_id)
            assert last == expected, f"sequence {seq_id} ends at {last}, the count says {expected}"

    def set_idle_stages(self, running: list[Sequence]) -> None:
        """What the time between steps is: waiting for others, or the engine's own work on the next token."""
        filling = [s for s in running if s.state is State.PREFILL]
        rest = Stage.QUEUE if len(running) > 1 else Stage.OTHER
        if rest is not self.idle_stage:
            self.idle_stage = rest
            for sequence in filling:
                sequence.clock.switch(rest)
        self.group_idle = Stage.QUEUE if filling else Stage.DECODE
        self.group.switch(self.group_idle, self.now)

    def begin(self, sequence: Sequence) -> None:
        """An admitted sequence gets its sampler, and keeps it over preemptions."""
        sequence.clock.switch(self.idle_stage)
        request = sequence.request
        # A schema describes the answer, not the reasoning before it.
        compiled = None if sequence.output.thinking else sequence.compiled
        sequence.sampler = self._backend.sampler(request.params, request.seed, compiled)

    def end(self, sequence: Sequence) -> None:
        """Give back what an ended sequence holds beside its cells."""
        sequence.clock.leave()
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None
        sequence.embeddings.clear()
        sequence.tokenized.close()

    def run(self, step: Step, between: Callable[[], None] | None = None, *, may_stop: bool = False) -> bool:
        """Compute a step; tokens are sampled apart. False: no room in the KV cache, and nothing changed.

        `between` is called while an image is encoded, or while tokens are computed. Raises EncodeFailed, DecodeFailed,
        and Stopped, with which nothing changed, if it `may_stop`.
        """
        if isinstance(step, Tokens):
            return self._tokens(step, between, may_stop=may_stop)
        if isinstance(step, PrefillImage):
            return self._prefill_image(step, may_stop=may_stop)
        self._encode(step, between)
        return True

    def knows(self, step: Encode) -> bool:
        """Whether the encoder is not needed for it; then its embedding is the sequence's from now on."""
        sequence, chunk = step.sequence, step.chunk
        if chunk.identity in sequence.embeddings:
            return True
        known = self._images.in_memory(salted(chunk.identity, sequence.request.salt))
        if known is not None:
            sequence.embeddings[chunk.identity] = known
            sequence.cached_images.add(chunk.image)
        return known is not None

    def sample(self, step: Tokens | PrefillImage) -> list[Sampled]:
        """Sample a token for everyone whose logits the step computed, and who has not ended meanwhile.

        Who fails ends alone, with its error.
        """
        alive = [(sequence, row) for sequence, row in _rows(step) if sequence.state is not State.DONE]
        rows = [(sequence, row) for sequence, row in alive if sequence.labels is None]
        # Those that decoded share the group's clock; the others get their first token.
        return self._sample(rows, [s for s, row in rows if row >= len(step.decode)]) if rows else []

    def sample_behind(self, sequence: Sequence, row: int) -> list[Sampled]:
        """Sample the token behind one of a draft, which is in this row of the batch."""
        return self._sample([(sequence, row)], [])

    def forget_draft(self, sequence: Sequence, drafted: int, right: int) -> None:
        """Of so many tokens of a draft so many were right, and the others leave the KV cache."""
        assert sequence.drafter is not None, "a draft has its drafter"
        sequence.drafter.drafted += drafted
        sequence.drafter.accepted += right
        try:
            self._forget(sequence.seq_id, sequence.n_pos)
        except OpsinError as error:
            sequence.end_with(error)

    def _sample(self, rows: list[tuple[Sequence, int]], first: list[Sequence]) -> list[Sampled]:
        self._switch(first, Stage.SAMPLE, Stage.SAMPLE, self.now)
        wanted: list[tuple[Sampler, int, int | None]] = []
        tokens: list[Sampled] = []
        sampling: list[Sequence] = []
        for sequence, row in rows:
            params = sequence.request.params
            top = 0 if params.logprobs is None and params.confidence else params.logprobs
            if sequence.forced:
                token = sequence.forced.pop(0)
                tokens.append((sequence, token, None if top is None else self._backend.logprobs(row, token, top)))
            else:
                assert sequence.sampler is not None, "a running sequence has a sampler"
                wanted.append((sequence.sampler, row, top))
                sampling.append(sequence)
        for sequence, result in zip(sampling, self._backend.sample(wanted), strict=True):
            if isinstance(result, OpsinError):
                sequence.end_with(result)
            else:
                tokens.append((sequence, *result))
        self.now = self._clock()
        self._switch(first, Stage.DETOKENIZE, Stage.DETOKENIZE, self.now)
        return tokens

    def score(self, step: Tokens | PrefillImage) -> list[Sequence]:
        """Read what the step computed for labels; gives those whose labels are all scored, and who failed alone."""
        found: list[tuple[Sequence, int, tuple[int, ...]]]
        found = [(sequence, row, ()) for sequence, row in _rows(step) if sequence.labels is not None]
        if isinstance(step, Tokens):
            rows = branch_rows(step)
            start = cells_needed(step) - len(rows)
            found += [(some[0].sequence, start + at, path) for at, ((_, path), some) in enumerate(rows.items())]
        for sequence, row, path in found:
            labels = sequence.labels
            if sequence.state is State.SCORE and labels is not None and (tokens := labels.unknown(path)):
                with sequence.clock.stage(Stage.SAMPLE):
                    try:
                        labels.take(path, self._backend.score(row, tokens))
                    except OpsinError as error:
                        sequence.end_with(error)
        scored = list({id(sequence): sequence for sequence, _, _ in found}.values())
        for sequence in scored:
            if sequence.state is State.SCORE and sequence.labels is not None and not sequence.labels.pending:
                sequence.decide()
        return scored

    def settled(self, step: Tokens | PrefillImage) -> None:
        """The step's output is processed: its stages end, and whoever answers from here on joins the group."""
        self.now = now = self._clock()
        self.group.switch(self.group_idle, now)
        for part in step.prefill if isinstance(step, Tokens) else (step,):
            sequence = part.sequence
            if sequence.state is State.DECODE:
                sequence.clock.join(self.group)
            else:
                sequence.clock.switch(self.idle_stage, now)

    def leave_reasoning(self, sequence: Sequence) -> None:
        """Where the answer begins: from here on the constraint holds. Who fails ends alone."""
        if sequence.output.thinking or sequence.state is State.DONE:
            return
        if sequence.sampler is None or sequence.compiled is None:
            return
        sequence.sampler.close()
        request = sequence.request
        try:
            sequence.sampler = self._backend.sampler(request.params, request.seed, sequence.compiled)
        except OpsinError as error:
            sequence.end_with(error)

    def _switch(self, sequences: Iterable[Sequence], own: Stage, group: Stage, now: float) -> None:
        self.group.switch(group, now)
        for sequence in sequences:
            sequence.clock.switch(own, now)

    @contextmanager
    def _native(self, sequences: list[Sequence], own: Stage, group: Stage, images: tuple[str, ...]) -> Iterator[None]:
        """A native call is the stage `own` of these sequences, and `group` of those that decode."""
        self._switch(sequences, own, group, self._clock())
        try:
            with self._watch(images):
                yield
        finally:
            self.now = self._clock()
            self._switch(sequences, self.idle_stage, self.group_idle, self.now)

    def _encode(self, step: Encode, between: Callable[[], None] | None) -> None:
        sequence, chunk = step.sequence, step.chunk
        if self.knows(step):
            return
        sequence.stream.deliver(Progress(f"reading image {chunk.image + 1} of {len(sequence.tokenized.images)}"))
        batch = {salted(chunk.identity, sequence.request.salt): (sequence, chunk)}
        for owner, other in step.beside:
            name = salted(other.identity, owner.request.salt)
            # Since the plan was made an owner may have ended and closed its chunks.
            ended = owner.state is State.DONE or owner.stream.done
            if not ended and self._images.in_memory(name) is None:
                batch.setdefault(name, (owner, other))
        owners = list({id(owner): owner for owner, _ in batch.values()}.values())
        with self._native(owners, Stage.ENCODE, Stage.QUEUE, tuple(_sha256(*pair) for pair in batch.values())):
            if len(batch) > 1:
                embeddings = self._backend.encode_many([other for _, other in batch.values()])
            else:
                embeddings = [self._backend.encode(chunk, between)]
        for (name, (owner, encoded)), embedding in zip(batch.items(), embeddings, strict=True):
            self.encodes += 1
            owner.encoded_images.add(encoded.image)
            owner.embeddings[encoded.identity] = embedding
            self._images.put(name, embedding)

    def _prefill_image(self, step: PrefillImage, *, may_stop: bool) -> bool:
        sequence, chunk = step.sequence, step.chunk
        embedding = sequence.embedding
        assert embedding is not None, "an image is encoded before it is prefilled"
        positions = chunk.positions_at(sequence.n_pos, step.start, step.stop)
        part, beside = embedding[step.start : step.stop], _next_tokens(step.decode)
        behind_at = sequence.n_pos + chunk.n_pos
        rows = EmbeddingRows(
            part, positions, sequence.seq_id, step.last, chunk.causal, beside, behind=step.text, behind_at=behind_at
        )
        group = Stage.DECODE if step.decode else Stage.QUEUE
        with self._native([sequence], Stage.IMAGE_PREFILL, group, (_sha256(sequence, chunk),)):
            began = self._clock()
            done = self._decode(rows, may_stop=may_stop)
            if step.text:  # rows of one product take the same time
                image = (step.stop - step.start) / step.rows
                sequence.clock.switch(Stage.TEXT_PREFILL, began + image * (self._clock() - began))
            return done

    def _tokens(self, step: Tokens, meanwhile: Callable[[], None] | None, *, may_stop: bool) -> bool:
        batch = _next_tokens(step.decode)
        filling = [part.sequence for part in step.prefill]
        # Who was parked comes back with the one token that was sampled last: for it this is a decode step.
        returning = [part.sequence for part in step.prefill if part.sequence.output.tokens and len(part.tokens) == 1]
        for part in step.prefill:
            batch.append(part.tokens, part.sequence.n_pos, part.sequence.seq_id, logits=part.last)
        for sequence, draft in zip(step.decode, step.drafts, strict=False):
            for at, token in enumerate(draft, 1):
                batch.append((token,), sequence.n_pos + at, sequence.seq_id, logits=True)
        for (_, path), (first, *others) in branch_rows(step).items():
            if others:
                batch.shared[len(batch.tokens)] = [one.seq_id for one in others]
            batch.append(path[-1:], first.sequence.n_pos + len(path) - 1, first.seq_id, logits=True)
        scoring = list({id(branch.sequence): branch.sequence for branch in step.branches}.values())
        group = Stage.DECODE if step.decode else Stage.QUEUE
        with self._native([*filling, *scoring], Stage.TEXT_PREFILL, group, ()):
            for sequence in (*scoring, *returning):
                sequence.clock.switch(Stage.DECODE)
            return self._decode(batch, meanwhile, may_stop=may_stop)

    def _decode(
        self, rows: TokenBatch | EmbeddingRows, meanwhile: Callable[[], None] | None = None, *, may_stop: bool
    ) -> bool:
        done = self._backend.decode(rows, may_stop=may_stop)
        if done:
            if meanwhile is not None:
                meanwhile()
            self._backend.synchronize()
        return done


def _next_tokens(decode: tuple[Sequence, ...]) -> TokenBatch:
    return TokenBatch(
        [s.last_token for s in decode],
        [s.n_pos for s in decode],
        [s.prefix.seq_id for s in decode],
        list(range(len(decode))),
    )


def _rows(step: Tokens | PrefillImage) -> list[tuple[Sequence, int]]:
    """Who gets a token from the logits that the step computed, and from which row of its batch."""
    rows = [(sequence, row) for row, sequence in enumerate(step.decode)]
    row = len(step.decode) - 1
    if isinstance(step, PrefillImage):
        return [*rows, (step.sequence, row + step.rows)] if step.last else rows
    for part in step.prefill:
        row += len(part.tokens)
        if part.last:
            rows.append((part.sequence, row))
    return rows


def _sha256(sequence: Sequence, chunk: ImageChunk) -> str:
    return sequence.tokenized.images[chunk.image].sha256
