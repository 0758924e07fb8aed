"""Policy: who is admitted, and whose cells go; `steps` says what the next step computes.

A function of its state and the clock that is handed in: it touches no backend, reads no time, and the same history
gives the same plans. What it plans counts as done when `ran` is called with it.
"""

from __future__ import annotations

from opsin.cache import CellBook, NoPrefixes, Prefix, Prefixes, PrefixIndex
from opsin.cache.units import cells_of, last_position_of, positions_of
from opsin.core.backend import BackendLimits
from opsin.engine.idle_cost import IdleCost
from opsin.engine.plan import (
    Forget,
    Fork,
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
    running sequences are moved to neighbouring ids.
    """

    def __init__(self, limits: BackendLimits, policy: Policy) -> None:
        self._limits = limits
        self._policy = policy
        self._parallel = min(policy.parallel, limits.n_ubatch)
        self.book = CellBook()
        self.idle_cost = IdleCost(limits.cell_cost)
        self.prefixes: Prefixes = PrefixIndex() if policy.keep_prefixes and limits.forks else NoPrefixes()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._free_ids = list(range(limits.n_seq_max - 1, -1, -1))
        self._idle: dict[int, Prefix] = {}
        self.preemptions = 0
        self._memory: list[MemoryOp] = []
        self._steps = StepChooser(limits, policy)
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
        if self._limits.shared:
            self._shed_slow_prefixes()
        else:
            self._close_ranks()
        step = self._secured(self._steps.choose(self._running, now))
        return Plan(tuple(self._memory), step)

    def plan_turn(self, now: float) -> Tokens | None:
        """A decode step between two layers of an encode: no admission, no fork, no eviction; None if it is not due."""
        decoding = self._decoding()
        if not decoding or not self._steps.due(now) or len(decoding) > self._room():
            return None
        return Tokens(decoding)

    def ran(self, step: Step, now: float, seconds: float = 0.0) -> None:
        """A step was carried out: move cursors and books on. Drawn tokens come through the sequences."""
        self._steps.ran(step, now, seconds, silent=not self._decoding())
        if isinstance(step, PrefillImage):
            self._advance(step.sequence, step.stop - step.start)
            if step.stop == step.run.n_tokens and not step.sequence.inside_picture(step.run.picture):
                self._line_up(step.sequence)
        elif isinstance(step, Tokens):
            if step.decode and not step.prefill:
                self.idle_cost.learn(len(step.decode), self.book.used, seconds * 1e3)
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
            self._preempt(self._last_in_line())
        memory, self._memory = tuple(self._memory), []
        return memory

    def check(self) -> None:
        """The books agree with each other. Raises AssertionError."""
        self.book.check()
        ids = [s.seq_id for s in self._running] + list(self._idle)
        assert len(ids) == len(set(ids)), "an id is used twice"
        assert sorted(ids + self._free_ids) == list(range(self._limits.n_seq_max)), "an id was lost"
        assert self.book.used <= self._limits.n_ctx, "more cells are booked than there are"
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

    def _room(self) -> int:
        return self._limits.n_ctx - self.book.used

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
        promised = sum(s.to_fill + 1 for s in self._running)
        needed = cells_of(sequence.prefix.planned[ready:]) + 1 + promised
        while not self._free_ids or self._room() < needed:
            victim = self.prefixes.oldest_idle()
            if victim is None or victim.seq_id == source:
                return False
            self._evict(victim)
        return True

    def _start(self, sequence: Sequence, source: int | None, ready: int) -> None:
        seq_id = self._take_id()
        shared = sequence.prefix.planned[:ready]
        if source is None or not cells_of(shared):
            ready = 0
        else:
            self._memory.append(Fork(source, seq_id, positions_of(shared)))
            if self._limits.shared:
                self.book.fork(source, seq_id, cells_of(shared))
            else:
                self.book.append(seq_id, cells_of(shared))
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
        if len(self._decoding()) < 2:
            return
        move = closing_move([s.seq_id for s in self._running], self._limits.n_seq_max)
        if move is None:
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
        """Idle cells are looked at by every decode step: when that costs too much, the oldest go."""
        if not self._idle or not self._decoding():
            return
        if self.idle_cost.slowdown(self.book.used, self.book.used) <= self._policy.idle_slowdown:
            return  # if all cells were idle they would not be too slow, so who holds them need not be counted
        while True:
            idle = self.book.used - self.book.held_by(s.seq_id for s in self._running)
            victim = self.prefixes.oldest_idle()
            if victim is None or self.idle_cost.slowdown(idle, self.book.used) <= self._policy.idle_slowdown:
                return
            self._evict(victim)

    def _secured(self, step: Step | None) -> Step | None:
        """Make room for a step; what is left of it when some of its own sequences had to go."""
        while step is not None and cells_needed(step) > self._room():
            victim = self.prefixes.oldest_idle()
            last = self._last_in_line()
            if victim is not None:
                self._evict(victim)
            elif len(self._running) > 1:
                self._preempt(last)
                step = without(step, last)
            else:
                last.end("length", "context")
                return None
        return step

    def _last_in_line(self) -> Sequence:
        """Whoever goes first when there is too little room. The first in line never does, so somebody gets on."""
        return min(self._running, key=lambda s: (s.request.priority, -s.request.number))

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._forget(sequence.seq_id, sequence)
        sequence.preempt()
        self.preemptions += 1
        self.add(sequence)
