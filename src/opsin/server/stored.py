"""Answers of the Responses API that later requests may go on from, for a while and within bounds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

KEPT_SECONDS = 3600.0
"""How long an answer is remembered."""
KEPT_BYTES, KEPT_BYTES_BY_KEY = 64 * 2**20, 16 * 2**20
"""Of all conversations together, and of one key's."""


@dataclass(slots=True)
class _Stored:
    conversation: Sequence[Any]
    items: dict[str, Any]
    size: int
    until: float


class StoredResponses:
    """Conversations by key and response; what is too old or too much goes, the oldest first. One thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stored: dict[tuple[str, str], _Stored] = {}  # the oldest first

    def keep(self, key: str, name: str, conversation: Sequence[Any], items: dict[str, Any], size: int) -> None:
        """Remember a conversation up to an answer, and the answer's items by their ids.

        `size` are the bytes of the whole: conversations share items, but each alone keeps them in memory. One that is
        larger than a key's share is not remembered.
        """
        if size <= KEPT_BYTES_BY_KEY:
            self._stored[key, name] = _Stored(conversation, items, size, self._clock() + KEPT_SECONDS)
            self._tidy(key)

    def conversation(self, key: str, name: str) -> Sequence[Any] | None:
        """What was said up to that answer; None if it is not known, or not any more."""
        self._tidy(key)
        found = self._stored.get((key, name))
        return None if found is None else found.conversation

    def item(self, key: str, name: str) -> Any:
        """An item of an answer by its id; None if it is not known, or not any more."""
        self._tidy(key)
        mine = (one.items for (owner, _), one in reversed(self._stored.items()) if owner == key)
        return next((items[name] for items in mine if name in items), None)

    def _tidy(self, key: str) -> None:
        now = self._clock()
        for place in [place for place, one in self._stored.items() if one.until < now]:
            del self._stored[place]
        self._shrink([place for place in self._stored if place[0] == key], KEPT_BYTES_BY_KEY)
        self._shrink(list(self._stored), KEPT_BYTES)

    def _shrink(self, places: list[tuple[str, str]], most: int) -> None:
        size = sum(self._stored[place].size for place in places)
        for place in places:
            if size <= most:
                return
            size -= self._stored.pop(place).size
