"""Who is admitted, whose cells go, and what the next step computes.

A function of its state and the clock that is handed in: it touches no backend, reads no time, and the same history
gives the same steps. What has to be done in the KV cache before a step collects in `Scheduler.kv`. A step is one
ubatch, and counts as done when `ran` is called with it.
"""

import itertools
from dataclasses import replace

from opsin.cache.kv_cache import KVCacheManager, Prefix
from opsin.core.backend import BackendLimits
from opsin.core.request import ImageChunk, TextChunk
from opsin.engine.pace import Pace
from opsin.engine.policy import Policy
from opsin.engine.request import Sequence, State
from opsin.engine.speculation import Speculation
from opsin.engine.step import Branch, Encode, PrefillImage, Step, Tokens, cells_needed, slices, without


class Scheduler:
    """First come, first served within a priority, over at most `policy.parallel` sequences at a time.

    No more run than a ubatch has rows, so that each of them gets on in every step of their kind. When there is too
    little room, idle prefixes go first, then the youngest running sequence of the lowest priority is put back into the
    queue instead of failing anybody. `waiting` is in the order of admission, `running` has those that hold cells,
    oldest first.
    """

    def __init__(self, limits: BackendLimits, policy: Policy) -> None:
        self._limits = limits
        self._policy = policy
        self._parallel = min(policy.parallel, limits.n_ubatch)
        self._pace = Pace(limits, policy)
        self._live_at = float("-inf")
        self._beside_live = False
        self._text_next = True
        self._turns = 0
        # More than twice the cache would hardly be asked for again, however small a cell is.
        swap_cells = min(policy.swap_cells, 2 * limits.n_ctx)
        self._speculation = Speculation(limits, policy.draft_beside) if policy.draft_beside else None
        self.kv = KVCacheManager(limits, keep_prefixes=policy.keep_prefixes, swap_cells=swap_cells)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._branches: list[Branch] = []  # of the step that was planned last

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def serves_live(self) -> bool:
        """Whether anybody is not of low priority."""
        return any(s.request.priority >= 0 for s in (*self.running, *self.waiting))

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: (-s.request.priority, s.parked, s.request.number))

    def plan(self, now: float) -> Step | None:
        """Admit who can be admitted, then choose one step; None when there is nothing to compute."""
        self._beside_live = now - self._live_at < self._policy.beside_live
        self._drop_branches(self._branches)  # of a step that was stopped, or found no room
        if self.waiting:
            self._admit()
        self._park()
        if any(s.request.priority >= 0 for s in self.running):
            self._live_at, self._beside_live = now, True
        self._free_an_id()
        return self._branched(self._secured(self._choose(now)))

    def plan_turn(self, now: float, priority: int = 0) -> Tokens | None:
        """A decode step between two layers of an encode: no admission, no fork, no eviction; None if it is not due.

        `priority` is that of the sequence whose image is encoded.
        """
        decoding = self.streams_beside(priority)
        if not decoding:
            return None
        due = self._pace.due_in_encode(now, priority, len(self.running))
        return Tokens(decoding) if due and len(decoding) <= self.kv.room else None

    def ran(self, step: Step, now: float, seconds: float = 0.0) -> None:
        """A step was carried out: move cursors and counts on. Sampled tokens come through the sequences."""
        self._learn(step, now, seconds)
        self._drop_branches(self._branches)
        if isinstance(step, Encode):
            return
        for sequence in step.decode:
            self.decoded(sequence)
        if isinstance(step, PrefillImage):
            self._advance(step.sequence, step.stop - step.start)
            if step.text:
                self._advance(step.sequence, len(step.text))
            if all(chunk.image != step.chunk.image for chunk in step.sequence.images_ahead):
                self._to_end_of_line(step.sequence)
        else:
            for part in step.prefill:
                self._advance(part.sequence, len(part.tokens))

    def decoded(self, sequence: Sequence) -> None:
        """The last token of a sequence is in the KV cache."""
        sequence.decoded()
        self.kv.cells.append(sequence.prefix.seq_id, 1)

    def release(self, sequence: Sequence, *, keep: bool) -> None:
        """A sequence ended: its cells stay as an idle prefix (`keep`), or are free."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._drop_branches([branch for branch in self._branches if branch.sequence is sequence])
            if keep:
                if self._speculation is not None:
                    self._speculation.ended(sequence)
                self.kv.retire(sequence.prefix)
                if self.running:
                    self.kv.swap_out_idle()
                most = self._policy.idle_cells
                while most is not None and self.kv.cells.held_by(self.kv.idle) > most:
                    self.kv.evict_oldest()
            else:
                self.kv.free(sequence.prefix)

    def next_phase(self, sequence: Sequence) -> None:
        """Its labels or its own words are done: it waits again, and finds what it needs in the KV cache."""
        self.release(sequence, keep=True)
        sequence.next_phase()
        self.add(sequence)

    def relieve(self) -> bool:
        """The backend had no room although the counts said so: give something up. False when nothing is left."""
        if self.kv.evict_oldest():
            return True
        if len(self.running) < 2:
            return False
        self._preempt(self._last_in_line())
        return True

    def check(self) -> None:
        """The counts agree with each other. Raises AssertionError."""
        self.kv.check([*(s.seq_id for s in self.running), *(branch.seq_id for branch in self._branches)])
        for sequence in self.running:
            assert self.kv.cells.held(sequence.seq_id) == sequence.n_cells, "a sequence's cells differ from the count"
            assert sequence.n_cells <= self._limits.n_ctx_seq, "a sequence holds more than it may"
        assert len(self.running) <= self._parallel

    def streams_beside(self, priority: int) -> tuple[Sequence, ...]:
        """Those who wait for their next token while a sequence of that priority is filled."""
        least = max(0, priority)
        return tuple([s for s in self._decoding() if s.request.priority >= least])

    def _decoding(self) -> tuple[Sequence, ...]:
        """Those whose answers have begun."""
        found = [s for s in self.running if s.state is State.DECODE]
        if not self._limits.unified:  # llama.cpp decodes only those together whose ids follow on each other
            found.sort(key=lambda s: s.seq_id)
        return tuple(found)

    def _advance(self, sequence: Sequence, tokens: int) -> None:
        self.kv.cells.append(sequence.seq_id, tokens)
        sequence.advance(tokens)

    def _to_end_of_line(self, sequence: Sequence) -> None:
        """An image of it is done: next is somebody else's."""
        self._turns += 1
        sequence.turn = self._turns

    def _admit(self) -> None:
        parked, no_room = [s.request.number for s in self.waiting if s.parked], False
        for sequence in list(self.waiting):
            if self._out_of_turn(sequence, parked) or (no_room and not sequence.parked):
                continue
            if len(self.running) >= self._parallel and not self._give_way(sequence):
                return
            admitted = self._admit_one(sequence)
            while admitted is False and self._give_way(sequence):
                admitted = self._admit_one(sequence)
            if admitted is False and (sequence.parked or sequence.request.priority >= 0):
                return  # cells come back when somebody ends
            no_room = no_room or admitted is False

    def _admit_one(self, sequence: Sequence) -> bool | None:
        """Let it run; False where there is no room for it, None where it had better wait for a prefix."""
        prefix = sequence.prefix
        match, source, ready = self.kv.find(prefix), None, 0
        if match is not None:
            if prefix.cells(match.coming) - prefix.cells(match.ready) >= self._policy.wait_for:
                return None  # somebody fills what this one needs: forking it later is cheaper than filling it twice
            # The last token is always decoded again, so that there are logits.
            source, ready = match.prefix, min(match.ready, len(prefix.units) - 1)
        if source is not None and not self.kv.spare_ids and [*self.kv.idle.values()] == [source]:
            self.kv.evict_oldest()  # nobody else has an id to give; from main memory it can be had
            source, ready = (source, ready) if source.swapped else (None, 0)
        if not (self._may_run(sequence) and self._has_room(prefix, source, ready)):
            if self.running:
                return False
            # Only the source itself is left: without it, a prompt that fits the context fits now.
            source, ready = None, 0
            self._has_room(prefix, source, ready)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.kv.start(prefix, source, ready)
        sequence.start()
        self._to_end_of_line(sequence)
        return True

    def _may_run(self, sequence: Sequence) -> bool:
        """Whether an id is left for its labels, and a slot for a sequence of low priority."""
        scored = any(s.labels is not None and s.labels.longest for s in (*self.running, sequence))
        if scored and self.running and self.kv.spare_ids + len(self.kv.idle) < 2:
            return False  # labels need an id beside those that run
        # The last slot is for whoever comes next: making room would cost somebody's work.
        last = self._beside_live and len(self.running) + 1 >= self._parallel > 1
        return sequence.parked or sequence.request.priority >= 0 or not (self.running and last)

    def _out_of_turn(self, sequence: Sequence, parked: list[int]) -> bool:
        """A parked row waits until no prompt is filled, a new one until there are fewer than slots, parked or not."""
        if sequence.parked:
            return self._filling
        if sequence.request.priority >= 0 or not parked:
            return False
        passed_enough = sequence.request.number >= min(parked) + 2 * self._parallel
        return passed_enough or len(self.running) + len(parked) >= self._parallel - self._beside_live

    @property
    def _filling(self) -> bool:
        """Whether the prompt of anybody has so much left that it is cheaper to park others."""
        least = self._policy.park_beside
        return least is not None and any(s.state is State.PREFILL and s.to_fill > least for s in self.running)

    def _park(self) -> None:
        """Let answers of low priority wait in main memory while a prompt is filled, unless they share most cells."""
        if not self._filling:
            return
        room = self.kv.swap_cells // 2 - sum(s.n_cells for s in self.waiting if s.parked)  # the rest is for idle ones
        for sequence in [s for s in self._decoding() if s.request.priority < 0]:
            if sequence.n_cells <= room and 2 * self.kv.cells.own(sequence.seq_id) > sequence.n_cells:
                room -= sequence.n_cells
                self.running.remove(sequence)
                self.kv.park(sequence.prefix)
                sequence.preempt()
                sequence.parked = True
                self.add(sequence)

    def _give_way(self, sequence: Sequence) -> bool:
        """Put a running sequence of lower priority back for this one; False if there is none."""
        last = self._last_in_line() if self.running else sequence
        if last.request.priority >= sequence.request.priority:
            return False
        self._preempt(last)
        return True

    def _has_room(self, prefix: Prefix, source: Prefix | None, ready: int) -> bool:
        """Evict idle prefixes until the prompt fits beside all that the running ones still need."""
        promised = sum(s.to_fill + 1 for s in self.running)
        new = prefix.cells(len(prefix.units))
        if source is not None and source.swapped:
            new = max(new, source.cells(source.ready))  # it comes back as a whole, and is cut then
        elif source is not None:
            new -= prefix.cells(ready)
        return self.kv.make_room(new + 1 + promised, keep=source)

    def _secured(self, step: Step | None) -> Step | None:
        """Make room for a step; what is left of it when some of its own sequences had to go."""
        while step is not None and cells_needed(step) > self.kv.room:
            if self.kv.evict_oldest():
                continue
            if isinstance(step, Tokens) and len(step.branches) > 1:
                step = replace(step, branches=step.branches[:-1])  # the others later
                continue
            last = self._last_in_line()
            if len(self.running) == 1:
                last.end("length", "context")
                return None
            self._preempt(last)
            step = without(step, last)
        return step

    def _free_an_id(self) -> None:
        """Labels are scored under ids of their own: where none is free, the last in line gives its own away."""
        while any(s.state is State.SCORE for s in self.running) and not self.kv.spare_ids:
            if not self.kv.evict_oldest():
                self._preempt(self._last_in_line())

    def _branched(self, step: Step | None) -> Step | None:
        """The step, with an id for each of its labels."""
        if isinstance(step, Tokens) and step.branches:
            self._branches = [replace(one, seq_id=self.kv.branch(one.sequence.prefix)) for one in step.branches]
            return replace(step, branches=tuple(self._branches))
        return step

    def _drop_branches(self, branches: list[Branch]) -> None:
        self._branches = [one for one in self._branches if one not in branches]
        for one in branches:
            self.kv.drop(one.seq_id)

    def _last_in_line(self) -> Sequence:
        """Whoever goes first when there is too little room. The first in line never does, so somebody gets on."""
        return min(self.running, key=lambda s: (s.request.priority, -s.request.number))

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.kv.free(sequence.prefix)
        sequence.preempt()
        self.preemptions += 1
        self.add(sequence)

    # What a step computes: time is shared between streams, images and the text of prompts. Cells do not matter here.

    def _learn(self, step: Step, now: float, seconds: float) -> None:
        """A step took so long; nothing was moved on yet."""
        if not isinstance(step, Tokens):
            self._text_next = True
        elif step.prefill or step.branches:
            self._text_next = False
        elif self._speculation is not None:
            self._speculation.learn(step, seconds)
        self._pace.learn(step, now, seconds, live=bool(self.streams_beside(0)), streams=bool(self._decoding()))

    def _choose(self, now: float) -> Step | None:
        """The next step; None when nobody has anything to compute."""
        decoding, live = self._decoding(), self.streams_beside(0)
        top = max((s.request.priority for s in self.running if s.state is not State.DECODE), default=-1)
        late = bool(live) and self._pace.behind and top < 0
        if late and self._policy.rows_cost:
            decoding = live
        if late or len(decoding) == len(self.running):
            if self._speculation is None or not decoding:
                return Tokens(decoding) if decoding else None
            return Tokens(decoding, drafts=self._speculation.drafts(decoding, self.kv.room))
        filling = [s for s in self.running if s.state is State.PREFILL and s.request.priority == top]
        decoding = tuple([s for s in decoding if s.request.priority >= top])
        streams = self.streams_beside(top)
        sliced = self._sliced(top, streams)
        texts = [s for s in filling if isinstance(s.chunk, TextChunk)]
        images = [s for s in filling if isinstance(s.chunk, ImageChunk)]
        scoring = [s for s in self.running if s.state is State.SCORE and s.request.priority == top]
        if streams and top >= 0 and self._pace.due(now, len(self.running), sliced):
            # Alone: a stream that waited for a slice of an image does not wait for a prompt's text, too.
            return Tokens(decoding)
        if (texts or scoring) and (self._text_next or not images):
            # Everyone's next token, labels, and text of prompts as far as the slice and the ubatch go.
            budget = min(self._limits.n_ubatch - len(decoding), self._pace.rows(sliced))
            branches = self._labels(scoring, min(budget, self._limits.n_outputs - len(self.running)))
            rows = sum(len(branch.tokens) for branch in branches)
            budget -= rows
            if branches and (budget < 0 or rows > self._limits.n_outputs - len(self.running)):
                # Not even one label beside all the streams: it goes alone.
                return Tokens((), (), branches)
            return Tokens(decoding, slices(texts, budget) if texts and budget else (), branches)
        # One image after another, not one request after another: a small one does not wait for ten images.
        return self._image(min(images, key=lambda s: s.turn), streams, sliced)

    def _labels(self, sequences: list[Sequence], budget: int) -> tuple[Branch, ...]:
        """Labels to be scored, as many as take so many rows, but one in any case; idle prefixes give way to them."""
        branches: list[Branch] = []
        for sequence in sequences:
            assert sequence.labels is not None, "only labels are scored"
            for path in sequence.labels.pending:
                budget -= len(path)
                no_id = len(branches) == self.kv.spare_ids and not self.kv.evict_oldest()
                if no_id or (branches and budget < 0):
                    return tuple(branches)
                branches.append(Branch(sequence, path))
        return tuple(branches)

    def _sliced(self, priority: int, streams: tuple[Sequence, ...]) -> float | None:
        """How long a prefill step may take, as others wait for it; None: as long as it likes."""
        policy = self._policy
        if priority < 0 and self._beside_live:  # a step that stops is lost
            return policy.slice_seconds if self._limits.stops and not streams else policy.low_slice_seconds
        return self._pace.crowded(policy.slice_seconds, len(self.running)) if streams else None

    def _image(self, sequence: Sequence, decoding: tuple[Sequence, ...], sliced: float | None) -> Step:
        chunk = sequence.chunk
        assert isinstance(chunk, ImageChunk)
        if sequence.embedding is None:
            return Encode(sequence, chunk, () if decoding else self._beside(sequence, chunk))
        start = sequence.chunk_offset
        rows = chunk.n_tokens - start
        if chunk.causal:
            rows = self._part(rows, len(decoding), sliced)
        together = decoding if chunk.causal and rows + len(decoding) <= self._limits.mixed_rows else ()
        text: tuple[int, ...] = ()
        ahead = sequence.chunks[sequence.chunk_index + 1 :] if start + rows == chunk.n_tokens else [chunk]
        if ahead and isinstance(ahead[0], TextChunk) and chunk.causal and self._limits.mixed_rows:
            most = min(self._limits.n_ubatch, self._limits.mixed_rows if together else self._limits.n_ubatch)
            if rows + ahead[0].n_tokens <= min(most - len(together), self._pace.rows(sliced)):
                text, ahead = ahead[0].tokens, ahead[1:]
        return PrefillImage(sequence, chunk, start, start + rows, not ahead, together, text)

    def _beside(self, sequence: Sequence, chunk: ImageChunk) -> tuple[tuple[Sequence, ImageChunk], ...]:
        """Chunks of equal size that are to be encoded soon; nobody may be streaming, as no turn comes in between."""
        if self._limits.encode_batch == 1:
            return ()
        others = (s for s in self.running if s is not sequence and s.state is State.PREFILL)
        coming = ((s, other) for s in (sequence, *others) for other in s.to_encode)
        wanted = ((s, other) for s, other in coming if other is not chunk and other.n_tokens == chunk.n_tokens)
        return tuple(itertools.islice(wanted, self._limits.encode_batch - 1))

    def _part(self, rows: int, beside: int, sliced: float | None) -> int:
        """How many of so many rows a step takes: equal parts, as the last step would cost as much as a whole one."""
        most, tile = min(self._pace.rows(sliced), self._limits.n_ubatch - beside), self._limits.tile
        if most < tile:
            tile //= 2  # 48 rows take longer than 64
        even = -(-rows // -(-rows // most))
        if most >= tile:
            even = min(most // tile, -(-even // tile)) * tile
        return min(rows, even)
