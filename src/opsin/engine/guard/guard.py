"""The guard: notices, while an answer streams, that it will not end by itself.

Three signals, each in a file of its own with its constants. What must be true for each:

- `cycle` (guard_cycle): the end of the answer is one passage again and again, as tokens or as characters: at least
  three copies (four of a long passage), and at least 192 tokens or 768 characters in all.
- `drift` (guard_drift, on the segments of guard_segments): in plain language, without marks of code or markup,
  either 28 list items on end hold at most two new words or numbers, and 88 % of them were named before; or at least
  seven sentences and 70 words resemble earlier sentences, a third of them fully, in no order.
- `compression` (guard_compression): the last 2,048 characters pack to 6.5 % of their size.

A false stop is worse than a late one, since the limit on tokens ends every answer anyway. So the constants were pushed
until nothing legitimate was stopped (tests/guard: tables, code, songs, forms, captions; and files of real machines),
and only then as near to the runaways as that left room. Runaway lists in code or JSON are left to the other two
signals and the limit: there, repetition is the normal case. So is endless counting: each number is new.
"""

from __future__ import annotations

from opsin.core.answer import GuardVerdict
from opsin.engine.guard.compression import SPAN, STRIDE, packs_too_well, squeeze
from opsin.engine.guard.cycle import TokenCycle, cyclic_end
from opsin.engine.guard.drift import Drift

_BATCH = 16  # tokens between two readings
_KEPT = 4608  # characters kept for cycles: four of the longest period and more


class Guard:
    """Watches one answer. It keeps a bounded amount of it and takes some microseconds a token; nothing raises."""

    def __init__(self) -> None:
        self._count = 0
        self._tokens: list[int] = []
        self._fresh: list[str] = []
        self._text = ""
        self._squeezed = ""
        self._cycle = TokenCycle()
        self._drift = Drift()

    def feed(self, token: int, text: str) -> GuardVerdict | None:
        """Take one token and the text it completed (empty while a character is incomplete).

        A verdict says why the answer should end here; `at_token` counts the tokens fed, this one included. The answer
        is read every `_BATCH` tokens.
        """
        self._tokens.append(token)
        self._fresh.append(text)
        if len(self._tokens) < _BATCH:
            return None
        return self._read()

    def _read(self) -> GuardVerdict | None:
        fresh = "".join(self._fresh)
        self._count += len(self._tokens)
        if self._cycle.feed(self._tokens):
            return GuardVerdict("cycle", self._count)
        self._fresh.clear()
        self._tokens.clear()
        self._text = (self._text + fresh)[-_KEPT:]
        self._squeezed = (self._squeezed + squeeze(fresh))[-SPAN:]
        if self._drift.read(fresh):
            return GuardVerdict("drift", self._count)
        if cyclic_end(self._text):
            return GuardVerdict("cycle", self._count)
        if self._count % STRIDE == 0 and packs_too_well(self._squeezed):
            return GuardVerdict("compression", self._count)
        return None
