"""What one rendering may cost: time, characters produced, size of any one value.

A template comes with a model file from a stranger. Each operation whose cost it can choose asks here first, so that
between two questions only little can happen; the clock is looked at on every question.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

SECONDS = 1.0
BASE_CHARS = 4_000_000
CHARS_PER_INPUT = 32  # a template may copy each character of the messages about this often
MAX_NODES = 100_000  # items in any one value, nested ones included
MAX_DEPTH = 100
MAX_INT_BITS = 1024
ITEM_CHARS = 16  # an item of a list weighs as many characters

_current: ContextVar[Budget] = ContextVar("opsin_template_budget")


class TemplateRefused(Exception):
    """A template went over a limit or used what it may not; the message ends a sentence that begins "it"."""


class Budget:
    """Counts down while one template renders; every method raises TemplateRefused when nothing is left."""

    __slots__ = ("_deadline", "chars", "depth", "limit")

    def __init__(self, input_chars: int, seconds: float = SECONDS) -> None:
        self.limit = BASE_CHARS + CHARS_PER_INPUT * input_chars
        self.chars = self.limit
        self.depth = 0
        self._deadline = time.perf_counter() + seconds

    def tick(self) -> None:
        """One step of the template."""
        if time.perf_counter() > self._deadline:
            raise TemplateRefused("runs too long")

    def charge(self, chars: int) -> None:
        """Pay for a result of so many characters, before it is made where that is possible."""
        self.tick()
        self.chars -= chars
        if self.chars < 0:
            raise TemplateRefused("writes too much text")

    def charge_value(self, value: Any) -> None:
        """Pay for a value that was made."""
        self.charge(size(value))

    def weigh(self, value: Any) -> int:
        """Characters a value would take written out, counting shared parts as often as they would be written.

        Without this check forty lists of two references each would print as 2**40 items.
        """
        if isinstance(value, str):
            return len(value)
        nodes = weight = 0
        stack = [value]
        while stack:
            item = stack.pop()
            nodes += 1
            if isinstance(item, str):
                weight += len(item)
            elif isinstance(item, dict):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                stack.extend(item)
            elif isinstance(item, int):
                weight += item.bit_length() // 3
            weight += ITEM_CHARS
            if nodes + len(stack) > MAX_NODES:
                raise TemplateRefused("builds too large a value")
        if weight > self.limit:
            raise TemplateRefused("builds too large a value")
        return weight

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """A call within a call."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TemplateRefused("calls itself too deeply")
        try:
            yield
        finally:
            self.depth -= 1

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Make this the budget of all that this thread renders meanwhile."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def size(value: Any) -> int:
    """Characters that the top level of a value takes in memory, roughly; constant time."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return ITEM_CHARS * len(value)
    return 0


def current() -> Budget:
    """The budget in force. Raises TemplateRefused when there is none, as while a template is compiled."""
    try:
        return _current.get()
    except LookupError:
        raise TemplateRefused("works outside a rendering") from None
