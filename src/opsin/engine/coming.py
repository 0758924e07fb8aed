"""One request preprocesses a picture; others that ask about it at the same time wait for that, and need no pixels."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from opsin.cache import salted
from opsin.core.layout import ImageRun, Layout


@dataclass(slots=True)
class _Announced:
    """A layout's handles; closing them ends the announcement, too."""

    coming: Coming
    identities: tuple[str, ...]
    owned: Any

    def close(self) -> None:
        self.coming.remove(self.identities)
        if self.owned is not None:
            self.owned.close()


class Coming:
    """Pictures whose pixels a running request has: they will be encoded for all. Used by any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        self._wanted: Counter[str] = Counter()
        self._held: Counter[str] = Counter()

    @contextmanager
    def turn(self, pictures: Iterable[str]) -> Iterator[None]:
        """Hold these pictures against others who would lay them out at the same time."""
        # In one order for all, so that nobody waits for somebody who waits for him.
        wanted = sorted(set(pictures))
        with self._guard:
            turns = [self._turns.setdefault(picture, threading.Lock()) for picture in wanted]
            self._wanted.update(wanted)
        try:
            with ExitStack() as stack:
                for turn in turns:
                    stack.enter_context(turn)
                yield
        finally:
            with self._guard:
                self._wanted.subtract(wanted)
                for picture in wanted:
                    if not self._wanted[picture]:
                        del self._wanted[picture], self._turns[picture]

    def __contains__(self, identity: str) -> bool:
        return self._held[identity] > 0

    def announce(self, layout: Layout, salt: str) -> None:
        """The layout has pixels that will be encoded; until it is closed nobody else of its salt needs them."""
        pixels = (run for run in layout.runs if isinstance(run, ImageRun) and not run.placeholder)
        identities = tuple(salted(run.identity, salt) for run in pixels)
        if identities:
            with self._guard:
                self._held.update(identities)
            layout.owned = _Announced(self, identities, layout.owned)

    def remove(self, identities: Iterable[str]) -> None:
        """A layout with these was closed."""
        with self._guard:
            self._held.subtract(identities)
            self._held += Counter()
