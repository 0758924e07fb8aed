"""Who is admitted, and whose cells go; `steps` says what the next step computes.

A function of its state and the clock that is handed in: it touches no backend, reads no time, and the same history
gives the same plans. What it plans counts as done when `ran` is called with it.
"""

from __future__ import annotations

from opsin.cache import Prefix
from opsin.core.backend import BackendLimits
from opsin.engine.kv_cache import KVCacheManager
from opsin.engine.plan import KVOp, Plan, PrefillImage, Step, Tokens, cells_needed, without
from opsin.engine.policy import Policy
from opsin.engine.sequence import Sequence
from opsin.engine.steps import StepChooser


class Scheduler:
    """First come, first served within a priority, over at most `policy.parallel` sequences at a time.

    No more run than a ubatch has rows, so that each of them gets on in every step of their kind. When there is too
    little room, idle prefixes go first, then the youngest running sequence of the lowest priority is put back into the
    queue instead of failing anybody.
    """

    def __init__(self, limits: BackendLimits, policy: Policy) -> None:
        self._limits = limits
        self._policy = policy
        self._parallel = min(policy.parallel, limits.n_ubatch)
        self.kv = KVCacheManager(limits, keep_prefixes=policy.keep_prefixes)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._steps = StepChooser(limits, policy)
        self._turns = 0
        self.preemptions = 0

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

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self._waiting.append(sequence)
        self._waiting.sort(key=lambda s: (-s.request.priority, s.request.number))

    def plan(self, now: float) -> Plan:
        """Admit who can be admitted, then choose one step."""
        if self._waiting:
            self._admit()
        step = self._secured(self._steps.choose(self._running, now))
        return Plan(self.kv.take_ops(), step)

    def plan_turn(self, now: float) -> Tokens | None:
        """A decode step between two layers of an encode: no admission, no fork, no eviction; None if it is not due."""
        decoding = self._steps.decoding(self._running)
        if not decoding or not self._steps.due_within(now) or len(decoding) > self.kv.room:
            return None
        return Tokens(decoding)

    def ran(self, step: Step, now: float, seconds: float = 0.0) -> None:
        """A step was carried out: move cursors and counts on. Sampled tokens come through the sequences."""
        silent = not self._steps.decoding(self._running)
        self._steps.ran(step, now, seconds, silent=silent)
        if isinstance(step, PrefillImage):
            self._advance(step.sequence, step.stop - step.start)
            if step.stop == step.chunk.n_tokens and not step.sequence.inside_image(step.chunk.image):
                self._to_end_of_line(step.sequence)
        elif isinstance(step, Tokens):
            append = self.kv.cells.append
            for sequence in step.decode:
                sequence.decoded()
                append(sequence.prefix.seq_id, 1)
            for part in step.prefill:
                self._advance(part.sequence, len(part.tokens))

    def release(self, sequence: Sequence, *, keep: bool) -> tuple[KVOp, ...]:
        """A sequence ended: its cells stay as an idle prefix (`keep`), or are free."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._running.remove(sequence)
            if keep:
                self.kv.retire(sequence.prefix)
                self._shed_idle_cells()
            else:
                self.kv.free(sequence.prefix)
        return self.kv.take_ops()

    def put_back(self, sequence: Sequence) -> tuple[KVOp, ...]:
        """A running sequence gives its cells up and leaves; it comes again by `add`."""
        self._running.remove(sequence)
        self.kv.free(sequence.prefix)
        sequence.preempt()
        return self.kv.take_ops()

    def relieve(self) -> tuple[KVOp, ...]:
        """The backend had no room although the counts said so: give something up. Empty when nothing is left."""
        if not self.kv.evict_oldest() and len(self._running) > 1:
            self._preempt(self._last_in_line())
        return self.kv.take_ops()

    def check(self) -> None:
        """The counts agree with each other. Raises AssertionError."""
        self.kv.check(s.seq_id for s in self._running)
        for sequence in self._running:
            assert self.kv.cells.held(sequence.seq_id) == sequence.n_cells, "a sequence's cells differ from the count"
            assert sequence.n_cells <= self._limits.n_ctx_seq, "a sequence holds more than it may"
        assert len(self._running) <= self._parallel

    def _advance(self, sequence: Sequence, tokens: int) -> None:
        self.kv.cells.append(sequence.seq_id, tokens)
        sequence.advance(tokens)

    def _to_end_of_line(self, sequence: Sequence) -> None:
        """An image of it is done: next is somebody else's."""
        self._turns += 1
        sequence.turn = self._turns

    # Admission ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        for sequence in list(self._waiting):
            if len(self._running) >= self._parallel:
                return
            prefix = sequence.prefix
            match, source, ready = self.kv.match(prefix), None, 0
            if match is not None:
                coming = prefix.planned_cells(match.coming) - prefix.planned_cells(match.ready)
                if coming >= self._policy.wait_for:
                    continue  # somebody fills what this one needs: forking it later is cheaper than filling it twice
                # The last token is always decoded again, so that there are logits.
                source, ready = match.prefix, min(match.ready, len(prefix.planned) - 1)
            if not self._has_room(prefix, source, ready):
                if self._running:
                    return  # cells come back when somebody ends
                # Only the source itself is left: without it, a prompt that fits the context fits now.
                source, ready = None, 0
                self._has_room(prefix, source, ready)
            self._waiting.remove(sequence)
            self._running.append(sequence)
            self.kv.start(prefix, source, ready)
            sequence.start()
            self._to_end_of_line(sequence)

    def _has_room(self, prefix: Prefix, source: Prefix | None, ready: int) -> bool:
        """Evict idle prefixes until the prompt fits beside all that the running ones still need."""
        promised = sum(s.to_fill + 1 for s in self._running)
        return self.kv.make_room(prefix.planned_cells() - prefix.planned_cells(ready) + 1 + promised, keep=source)

    # Cells --------------------------------------------------------------------------------------------------------

    def _shed_idle_cells(self) -> None:
        """Keep no more idle cells than the policy says: where attention looks at them, too, each costs time."""
        most = self._policy.idle_cells
        while most is not None and self.kv.idle_cells > most:
            self.kv.evict_oldest()

    def _secured(self, step: Step | None) -> Step | None:
        """Make room for a step; what is left of it when some of its own sequences had to go."""
        while step is not None and cells_needed(step) > self.kv.room:
            if self.kv.evict_oldest():
                continue
            last = self._last_in_line()
            if len(self._running) == 1:
                last.end("length", "context")
                return None
            self._preempt(last)
            step = without(step, last)
        return step

    def _last_in_line(self) -> Sequence:
        """Whoever goes first when there is too little room. The first in line never does, so somebody gets on."""
        return min(self._running, key=lambda s: (s.request.priority, -s.request.number))

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.kv.free(sequence.prefix)
        sequence.preempt()
        self.preemptions += 1
        self.add(sequence)
