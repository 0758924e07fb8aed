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

A repetition that was asked for is no runaway: a passage that the prompt quotes may fill twice the space of as many
copies as the largest number in the prompt says ("repeat the word hello 200 times").
"""

from __future__ import annotations

import re

from opsin.core.answer import GuardVerdict
from opsin.engine.guard.compression import SPAN, STRIDE, packs_too_well, squeeze
from opsin.engine.guard.cycle import MAX_PERIOD_CHARS, TokenCycle, cyclic_end
from opsin.engine.guard.drift import Drift

_BATCH = 8  # tokens between two readings
_KEPT = 4608  # characters kept for cycles: four of the longest period and more


class Guard:
    """Watches one answer. It keeps a bounded amount of it and takes some microseconds a token; nothing raises."""

    def __init__(self, prompt: str = "") -> None:
        self._prompt = prompt
        self._count = 0
        self._characters = 0
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
        verdict = self._read()
        return None if verdict is None or self._is_asked_for() else verdict

    def _read(self) -> GuardVerdict | None:
        fresh, tokens = "".join(self._fresh), self._tokens
        self._fresh, self._tokens = [], []
        self._count += len(tokens)
        self._characters += len(fresh)
        self._text = (self._text + fresh)[-_KEPT:]
        self._squeezed = (self._squeezed + squeeze(fresh))[-SPAN:]
        cycles, drifts = self._cycle.feed(tokens), self._drift.read(fresh)
        if cycles:
            return GuardVerdict("cycle", self._count)
        if drifts:
            return GuardVerdict("drift", self._count)
        if cyclic_end(self._text):
            return GuardVerdict("cycle", self._count)
        if self._count % STRIDE == 0 and packs_too_well(self._squeezed):
            return GuardVerdict("compression", self._count)
        return None

    def _is_asked_for(self) -> bool:
        """Whether the prompt quotes the passage that comes again and again, and names more copies."""
        copies = max(map(int, re.findall(r"(?<!\d)\d{1,4}(?!\d)", self._prompt)), default=0)
        tail = self._text[-2 * MAX_PERIOD_CHARS :].lower()
        periods = range(1, min(len(tail) // 2, self._characters))
        period = next((length for length in periods if tail[length:] == tail[:-length]), 0)
        if period == 0 or self._characters > 2 * copies * period:
            return False
        prompt = _words(self._prompt.lower())
        return any(_words(tail[-period - start : len(tail) - start]) in prompt for start in range(period))


def _words(text: str) -> str:
    return " ".join(["", *re.findall(r"[^\W_]+", text), ""])
