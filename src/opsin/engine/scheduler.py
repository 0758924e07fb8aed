"""Policy: who is admitted, and whose cells go; `steps` says what the next step computes.

A function of its state and the clock that is handed in: it touches no backend, reads no time, and the same history
gives the same plans. What it plans counts as done when `ran` is called with it.
"""

from __future__ import annotations

from collections.abc import Container

from opsin.cache import NoPrefixes, Prefix, Prefixes, PrefixIndex
from opsin.cache.units import cells_of, last_position_of, positions_of
from opsin.core.backend import BackendLimits
from opsin.engine.books import Books
from opsin.engine.idle_cost import IdleCost
from opsin.engine.plan import (
    Forget,
    Fork,
    Join,
    Leave,
    MemoryOp,
    Plan,
    PrefillImage,
    Step,
    Tokens,
    cells_needed,
    without,
)
from opsin.engine.policy import Policy
from opsin.engine.ranks import closing_move, spread
from opsin.engine.sequence import Sequence
from opsin.engine.steps import StepChooser


class Scheduler:
    """First come, first served within a priority, over at most `policy.parallel` sequences at a time.

    No more run than a micro-batch has rows, so that each of them gets on in every step of their kind.
    Sequence ids and KV cells are budgets. A sequence that ends leaves its cells behind as an idle prefix, until they
    or its id are needed: least recently used first. When no idle one is left, the youngest running sequence of the
    lowest priority is put back into the queue instead of failing anybody.

    Where each sequence has a memory of its own (`limits.shared` is False), cells are never short; instead a fork is a
    copy, so an idle prefix is carried on by who needs it rather than copied, prompts' texts go one after another, and
    running sequences are moved to neighbouring ids. Many questions on one picture at a time are answered in the common
    memory, where there is one: a step of theirs reads the cells of the picture once.
    """

    def __init__(self, limits: BackendLimits, policy: Policy) -> None:
        self._limits = limits
        self._policy = policy
        self._parallel = min(policy.parallel, limits.n_ubatch)
        self.book = Books(limits)
        self.idle_cost = IdleCost(limits.cell_cost)
        self.prefixes: Prefixes = PrefixIndex() if policy.keep_prefixes and limits.forks else NoPrefixes()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._free_ids = list(range(limits.n_seq_max - 1, -1, -1))
        self._idle: dict[int, Prefix] = {}
        self.preemptions = 0
        self._memory: list[MemoryOp] = []
        self._steps = StepChooser(limits, policy, self.book.members)
        self._turns = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Those that wait for admission, in order."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Those that hold cells, oldest first."""
        return tuple(self._running)

    @property
    def idle_ids(self) -> tuple[int, ...]:
        """Ids of idle prefixes."""
        return tuple(self._idle)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self._waiting.append(sequence)
        self._waiting.sort(key=lambda s: (-s.request.priority, s.request.number))

    def plan(self, now: float) -> Plan:
        """Admit who can be admitted, then choose one step."""
        self._memory = []
        self._admit()
        self._shed_slow_prefixes()
        if not self._limits.shared:
            self._close_ranks()
        step = self._secured(self._steps.choose(self._running, now))
        return Plan(tuple(self._memory), step)

    def plan_turn(self, now: float) -> Tokens | None:
        """A decode step between two layers of an encode: no admission, no fork, no eviction; None if it is not due."""
        decoding = self._decoding()
        if not decoding or not self._steps.due_within(now):
            return None
        step = Tokens(decoding)
        fits = len(decoding) <= self.book.room and cells_needed(step, self.book.members) <= self.book.common_room
        return step if fits else None

    def ran(self, step: Step, now: float, seconds: float = 0.0) -> None:
        """A step was carried out: move cursors and books on. Drawn tokens come through the sequences."""
        self._steps.ran(step, now, seconds, silent=not self._decoding())
        if isinstance(step, PrefillImage):
            self._advance(step.sequence, step.stop - step.start)
            if step.stop == step.run.n_tokens and not step.sequence.inside_picture(step.run.picture):
                self._line_up(step.sequence)
        elif isinstance(step, Tokens):
            if step.decode and not step.prefill:
                together, cells = self.book.seen_together(s.seq_id for s in step.decode)
                if len(together) == len(step.decode):
                    self.idle_cost.learn(len(together), cells.used, seconds * 1e3)
            for sequence in step.decode:
                sequence.decoded()
                self.book.append(sequence.seq_id, 1)
            for part in step.prefill:
                self._advance(part.sequence, len(part.tokens))
                if not self._limits.shared:
                    self._line_up(part.sequence)

    def release(self, sequence: Sequence, *, keep: bool) -> tuple[MemoryOp, ...]:
        """A sequence ended: its cells stay as an idle prefix (`keep`), or are free."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return ()
        if sequence not in self._running:
            return ()
        self._running.remove(sequence)
        self._memory = []
        whole = cells_of(sequence.prefix.units)
        if keep and whole and isinstance(self.prefixes, PrefixIndex):
            self._retire(sequence, whole)
        else:
            self._forget(sequence.seq_id, sequence)
        memory, self._memory = tuple(self._memory), []
        return memory

    def relieve(self) -> tuple[MemoryOp, ...]:
        """The backend had no room although the books said so: give something up. Empty when nothing is left."""
        self._memory = []
        victim = self.prefixes.oldest_idle()
        if victim is not None:
            self._evict(victim)
        elif len(self._running) > 1:
            self._preempt(self._last_in_line(self._running))
        memory, self._memory = tuple(self._memory), []
        return memory

    def check(self) -> None:
        """The books agree with each other. Raises AssertionError."""
        self.book.check()
        ids = [s.seq_id for s in self._running] + list(self._idle)
        assert len(ids) == len(set(ids)), "an id is used twice"
        assert sorted(ids + self._free_ids) == list(range(self._limits.n_seq_max)), "an id was lost"
        for sequence in self._running:
            assert self.book.held(sequence.seq_id) == sequence.n_cells, "a sequence's cells differ from the book's"
            assert sequence.n_cells <= self._limits.n_ctx_seq, "a sequence holds more than it may"
        assert len(self._running) <= self._parallel

    def expected_positions(self) -> dict[int, int]:
        """The last position of each sequence id while nobody runs: idle prefixes have theirs, all others none (-1)."""
        held = {prefix.seq_id: last_position_of(prefix.units) for prefix in self._idle.values()}
        return {seq_id: held.get(seq_id, -1) for seq_id in range(self._limits.n_seq_max)}

    def _decoding(self) -> tuple[Sequence, ...]:
        return self._steps.decoding(self._running)

    def _advance(self, sequence: Sequence, tokens: int) -> None:
        self.book.append(sequence.seq_id, tokens)
        sequence.advance(tokens)

    # Admission ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        for sequence in list(self._waiting):
            if len(self._running) >= self._parallel:
                return
            match = self.prefixes.match(sequence.prefix.planned)
            ready = 0
            if match is not None:
                coming = cells_of(sequence.prefix.planned[match.ready : match.coming])
                if coming >= self._policy.wait_for and match.coming > match.ready:
                    continue  # somebody fills what this one needs: forking it later is cheaper than filling it twice
                # The last token is always decoded again, so that there are logits.
                ready = min(match.ready, len(sequence.prefix.planned) - 1)
                self.prefixes.touch(match.prefix)
            if match is not None and not self._limits.shared:
                shared = cells_of(sequence.prefix.planned[:ready])
                if shared < self._policy.wait_for:
                    match, ready = None, 0  # a copy takes longer
                elif match.prefix.idle and cells_of(match.prefix.units) <= 2 * shared:
                    self._carry_on(sequence, match.prefix, ready)
                    continue
            source = None if match is None else match.prefix.seq_id
            if not self._make_room_for(sequence, ready, source):
                if self._running:
                    return  # cells come back when somebody ends
                # Only the source itself is left: without it, a prompt that fits the context fits now.
                source, ready = None, 0
                self._make_room_for(sequence, ready, source)
            self._start(sequence, source, ready)

    def _make_room_for(self, sequence: Sequence, ready: int, source: int | None) -> bool:
        """Evict idle prefixes until the sequence fits; never its own source."""
        needed = cells_of(sequence.prefix.planned[ready:]) + 1 + self._promised()
        while not self._free_ids or self.book.room < needed:
            victim = self.prefixes.oldest_idle()
            if victim is None or victim.seq_id == source:
                return False
            self._evict(victim)
        return True

    def _promised(self, among: Container[int] | None = None) -> int:
        """Cells that the prompts of those that run, or of those of them `among` these ids, still need."""
        return sum(s.to_fill + 1 for s in self._running if among is None or s.seq_id in among)

    def _start(self, sequence: Sequence, source: int | None, ready: int) -> None:
        seq_id = self._take_id()
        shared = sequence.prefix.planned[:ready]
        coming = cells_of(sequence.prefix.planned[ready:]) + 1
        if source is None or not cells_of(shared):
            ready = 0
        else:
            self._gather(source, sequence, cells_of(shared))
            self._memory.append(Fork(source, seq_id, positions_of(shared)))
            self.book.fork(source, seq_id, cells_of(shared))
            if seq_id in self.book.members and self._promised(self.book.members) + coming > self.book.common_room:
                self._leave(seq_id)
        self._begin(sequence, seq_id, ready)

    def _carry_on(self, sequence: Sequence, prefix: Prefix, ready: int) -> None:
        """An idle prefix becomes the beginning of this sequence, where it is."""
        seq_id, shared = prefix.seq_id, sequence.prefix.planned[:ready]
        self.prefixes.remove(prefix)
        del self._idle[seq_id]
        self._memory.append(Forget(seq_id, positions_of(shared)))
        self.book.cut(seq_id, cells_of(shared))
        self._begin(sequence, seq_id, ready)

    def _begin(self, sequence: Sequence, seq_id: int, ready: int) -> None:
        self._waiting.remove(sequence)
        sequence.start(seq_id, max(ready, 1))  # the salt is always there
        self.prefixes.add(sequence.prefix)
        self._running.append(sequence)
        self._line_up(sequence)

    def _take_id(self) -> int:
        """A free id, near to those that run."""
        running = [s.seq_id for s in self._running]
        seq_id = min(self._free_ids, key=lambda free: (spread([*running, free]), free))
        self._free_ids.remove(seq_id)
        return seq_id

    def _line_up(self, sequence: Sequence) -> None:
        """Go behind all others that wait for the encoder."""
        self._turns += 1
        sequence.turn = self._turns

    # Memory -------------------------------------------------------------------------------------------------------

    def _evict(self, prefix: Prefix) -> None:
        self.prefixes.remove(prefix)
        del self._idle[prefix.seq_id]
        self._free(prefix.seq_id)

    def _forget(self, seq_id: int, sequence: Sequence) -> None:
        self.prefixes.remove(sequence.prefix)
        self._free(seq_id)

    def _free(self, seq_id: int) -> None:
        self.book.drop(seq_id)
        self._free_ids.append(seq_id)
        self._memory.append(Forget(seq_id))

    def _retire(self, sequence: Sequence, cells: int) -> None:
        """Keep an ended sequence's cells; a picture that was cut in its middle is no unit, so its rows go."""
        seq_id = sequence.seq_id
        if self.book.held(seq_id) != cells:
            self._forget(seq_id, sequence)
            return
        prefix = sequence.prefix
        prefix.planned, prefix.idle = tuple(prefix.units), True
        self.prefixes.touch(prefix)
        self._idle[seq_id] = prefix
        for contained in self.prefixes.idle_within(prefix):
            self._evict(contained)

    def _close_ranks(self) -> None:
        """Bring those that answer to neighbouring ids, one a step; an idle prefix in the way goes elsewhere."""
        apart = [s for s in self._running if s.seq_id not in self.book.members]
        if len(self._steps.decoding(apart)) < 2:
            return
        move = closing_move([s.seq_id for s in apart], self._limits.n_seq_max)
        if move is None or any(s.seq_id == move[1] for s in self._running):
            return
        source, target = move
        if target in self._idle and not self._free_ids:
            victim = self.prefixes.oldest_idle()
            assert victim is not None, "an idle prefix is in the index"
            self._evict(victim)
        in_the_way = self._idle.pop(target, None)
        if in_the_way is not None:
            elsewhere = self._take_id()
            self._move(in_the_way, elsewhere)
            self._idle[elsewhere] = in_the_way
        self._free_ids.remove(target)
        sequence = next(s for s in self._running if s.seq_id == source)
        self._move(sequence.prefix, target)
        sequence.move(target)

    def _move(self, prefix: Prefix, target: int) -> None:
        source, used = prefix.seq_id, prefix.used
        self.prefixes.remove(prefix)
        self._memory += (Fork(source, target, -1), Forget(source))
        self.book.move(source, target)
        self._free_ids.append(source)
        prefix.seq_id = target
        self.prefixes.add(prefix)
        prefix.used = used  # to be moved is no use

    def _shed_slow_prefixes(self) -> None:
        """Decode steps look at idle cells in a memory that is shared: when that costs too much, the oldest go."""
        if not self._idle or not self.book.seen_together(s.seq_id for s in self._decoding())[0]:
            return
        running, book = self.book.seen_together(s.seq_id for s in self._running)
        if self.idle_cost.slowdown(book.used, book.used) <= self._policy.idle_slowdown:
            return  # if all cells were idle they would not be too slow, so who holds them need not be counted
        while True:
            idle = book.used - book.held_by(running)
            victim = next(iter(self._idle_beside()), None)
            if victim is None or self.idle_cost.slowdown(idle, book.used) <= self._policy.idle_slowdown:
                return
            self._evict(victim)

    def _idle_beside(self) -> list[Prefix]:
        """Idle prefixes in a memory that is shared, the one used longest ago first."""
        beside = (self._idle[seq_id] for seq_id in self.book.seen_together(self._idle)[0])
        return sorted(beside, key=lambda prefix: prefix.used)

    # Common memory ------------------------------------------------------------------------------------------------

    def _gather(self, source: int, sequence: Sequence, shared: int) -> None:
        """Let a running sequence join the common memory, as `sequence` will share so many cells with it.

        Only one family is there at a time: others would look at its cells in vain. Of an earlier one whose answers
        have ended, the prefix used last goes back to its own place.
        """
        owner = next((s for s in self._running if s.seq_id == source), None)
        if self._limits.common == 0 or owner is None or shared < self._policy.gather:
            return
        coming = cells_of(sequence.prefix.planned) - shared
        if source in self.book.members or max(coming, owner.to_fill) > shared:
            return  # much would be filled beside the others' cells, which takes longer there
        fits = self.book.held(source) + owner.to_fill + coming + 2 <= self._limits.common
        if not fits or any(s.seq_id in self.book.members for s in self._running):
            return
        earlier = self._idle_beside()
        for prefix in earlier[:-1]:
            self._evict(prefix)
        for prefix in earlier[-1:]:
            self._leave(prefix.seq_id)
        self._memory.append(Join(source))
        self.book.join(source)

    def _leave(self, seq_id: int) -> None:
        self._memory.append(Leave(seq_id))
        self.book.leave(seq_id)

    def _make_common_room_for(self, step: Step) -> None:
        """Members go back to their own places, idle ones go altogether, until the step fits the common memory."""
        members = self.book.members
        while cells_needed(step, members) > self.book.common_room:
            victim = next(iter(self._idle_beside()), None)
            if victim is not None:
                self._evict(victim)
            else:
                self._leave(self._last_in_line([s for s in self._running if s.seq_id in members]).seq_id)

    def _secured(self, step: Step | None) -> Step | None:
        """Make room for a step; what is left of it when some of its own sequences had to go."""
        if step is not None and self.book.members:
            self._make_common_room_for(step)
        while step is not None and cells_needed(step) > self.book.room:
            victim = self.prefixes.oldest_idle()
            last = self._last_in_line(self._running)
            if victim is not None:
                self._evict(victim)
            elif len(self._running) > 1:
                self._preempt(last)
                step = without(step, last)
            else:
                last.end("length", "context")
                return None
        return step

    @staticmethod
    def _last_in_line(running: list[Sequence]) -> Sequence:
        """Whoever goes first when there is too little room. The first in line never does, so somebody gets on."""
        return min(running, key=lambda s: (s.request.priority, -s.request.number))

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._forget(sequence.seq_id, sequence)
        sequence.preempt()
        self.preemptions += 1
        self.add(sequence)
