"""The guard: notices, while an answer streams, that it will not end by itself."""

from __future__ import annotations

from opsin.core.answer import GuardVerdict
from opsin.engine.guard_compression import SPAN, STRIDE, packs_too_well, squeeze
from opsin.engine.guard_cycle import TokenCycle, cyclic_end
from opsin.engine.guard_drift import Drift

_BATCH = 8
_KEPT = 4096


class Guard:
    """Watches one answer. Never raises, keeps a bounded amount of it, and takes a few microseconds a token."""

    def __init__(self) -> None:
        self._tokens = 0
        self._fresh: list[str] = []
        self._text = ""
        self._squeezed = ""
        self._cycle = TokenCycle()
        self._drift = Drift()

    def feed(self, token: int, text: str) -> GuardVerdict | None:
        """Take one token and the text it completed (empty while a character is incomplete).

        A verdict, once there is one, says why the answer should end here.
        """
        self._tokens += 1
        self._fresh.append(text)
        if self._cycle.feed(token):
            return GuardVerdict("cycle", self._tokens)
        if self._tokens % _BATCH:
            return None
        return self._read()

    def _read(self) -> GuardVerdict | None:
        fresh = "".join(self._fresh)
        self._fresh.clear()
        self._text = (self._text + fresh)[-_KEPT:]
        self._squeezed = (self._squeezed + squeeze(fresh))[-SPAN:]
        if self._drift.read(fresh):
            return GuardVerdict("drift", self._tokens)
        if cyclic_end(self._text):
            return GuardVerdict("cycle", self._tokens)
        if self._tokens % STRIDE == 0 and packs_too_well(self._squeezed):
            return GuardVerdict("compression", self._tokens)
        return None
