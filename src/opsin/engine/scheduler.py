"""Policy: which sequence does what in the next step. No side effect outside its own lists; knows no backend."""

from __future__ import annotations

from collections import deque

from opsin.core.backend import BackendLimits
from opsin.core.layout import ImageRun
from opsin.engine.plan import Decode, Encode, PrefillImage, PrefillText, Step
from opsin.engine.sequence import Sequence, State


class Scheduler:
    """First come, first served, over at most `parallel` sequences at a time.

    `plan` is a function of the sequences handed in so far and of what was absorbed: the same history gives the same
    plans. A sequence's id is given at admission and taken back by `release`, after the runner forgot its cells.
    """

    def __init__(self, limits: BackendLimits, parallel: int) -> None:
        self._limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._free_ids = list(range(min(parallel, limits.n_seq_max) - 1, -1, -1))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that have not ended: running ones first, then those that wait, in order."""
        return (*self._running, *self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self._waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give ids to those that may run now."""
        admitted = []
        while self._waiting and self._free_ids:
            sequence = self._waiting.popleft()
            sequence.seq_id = self._free_ids.pop()
            sequence.state = State.PREFILL
            self._running.append(sequence)
            admitted.append(sequence)
        return admitted

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that ended; its id is free again."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._free_ids.append(sequence.seq_id)
            sequence.seq_id = -1
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def plan(self) -> Step | None:
        """The next step, None when nobody runs. A prompt is filled before answers go on; one micro-batch a step."""
        for sequence in self._running:
            if sequence.state is State.PREFILL:
                return self._prefill(sequence)
        decoding = tuple(s for s in self._running if s.state is State.DECODE)
        return Decode(decoding[: self._limits.n_ubatch]) if decoding else None

    def _prefill(self, sequence: Sequence) -> Step:
        run = sequence.run
        assert run is not None, "a sequence in prefill has a run at its cursor"
        start = sequence.run_offset
        room = self._limits.n_ubatch
        if isinstance(run, ImageRun):
            if sequence.needs_encode:
                return Encode(sequence, run)
            stop = min(run.n_tokens, start + room) if run.causal else run.n_tokens
            return PrefillImage(sequence, run, start, stop, last=self._is_last(sequence, stop))
        stop = min(run.n_tokens, start + room)
        return PrefillText(sequence, run.tokens[start:stop], last=self._is_last(sequence, stop))

    @staticmethod
    def _is_last(sequence: Sequence, stop: int) -> bool:
        runs = sequence.layout.runs
        return sequence.run_index == len(runs) - 1 and stop == runs[-1].n_tokens
