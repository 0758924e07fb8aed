"""One request preprocesses an image; others that ask about it at the same time wait for that, and need no pixels."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from opsin.cache import salted
from opsin.core.request import ImageChunk, TokenizedPrompt


@dataclass(slots=True)
class _Announced:
    """What a tokenized prompt owns; closing it ends the announcement, too."""

    encodes: InFlightEncodes
    identities: tuple[str, ...]
    owned: Any

    def close(self) -> None:
        self.encodes.remove(self.identities)
        if self.owned is not None:
            self.owned.close()


class InFlightEncodes:
    """Images whose pixels a request has that is on its way: they will be encoded for all. Used by any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._wanted: Counter[str] = Counter()
        self._held: Counter[str] = Counter()

    @contextmanager
    def alone(self, images: Iterable[str]) -> Iterator[None]:
        """Hold these images (SHA-256 of their pixels) against others who would preprocess them at the same time."""
        # In one order for all, so that nobody waits for somebody who waits for him.
        wanted = sorted(set(images))
        with self._guard:
            locks = [self._locks.setdefault(image, threading.Lock()) for image in wanted]
            self._wanted.update(wanted)
        try:
            with ExitStack() as stack:
                for lock in locks:
                    stack.enter_context(lock)
                yield
        finally:
            with self._guard:
                self._wanted.subtract(wanted)
                for image in wanted:
                    if not self._wanted[image]:
                        del self._wanted[image], self._locks[image]

    def __contains__(self, identity: str) -> bool:
        return self._held[identity] > 0

    def add(self, tokenized: TokenizedPrompt, salt: str) -> None:
        """It has pixels that will be encoded; until it is closed nobody else of its salt needs them."""
        pixels = (chunk for chunk in tokenized.chunks if isinstance(chunk, ImageChunk) and not chunk.placeholder)
        identities = tuple(salted(chunk.identity, salt) for chunk in pixels)
        if identities:
            with self._guard:
                self._held.update(identities)
            tokenized.owned = _Announced(self, identities, tokenized.owned)

    def remove(self, identities: Iterable[str]) -> None:
        """A tokenized prompt with these was closed."""
        with self._guard:
            self._held.subtract(identities)
            self._held += Counter()
