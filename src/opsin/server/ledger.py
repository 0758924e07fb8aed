"""Which pictures are being worked on, told by the child to its parent, so that one that kills twice is known."""

from __future__ import annotations

import socket
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Protocol

DEATHS_TO_BLOCK = 2
REMEMBERED = 10_000
"""Pictures whose deaths are counted; beyond that the oldest are forgotten."""


class Ledger(Protocol):
    """Where the server writes what it begins and ends. `blocked` are identities that nobody may work on any more."""

    @property
    def blocked(self) -> frozenset[str]:
        """Pictures that were in flight at two deaths."""
        ...

    def begin(self, identities: Iterable[str]) -> None:
        """Written before the engine gets them."""
        ...

    def end(self, identities: Iterable[str]) -> None:
        """Written when the engine is done with them."""
        ...


class NoLedger:
    """For a server without a parent: nothing is told, nothing is blocked."""

    blocked: frozenset[str] = frozenset()

    def begin(self, identities: Iterable[str]) -> None:
        """Nobody listens."""

    def end(self, identities: Iterable[str]) -> None:
        """Nobody listens."""


class LineLedger:
    """The child's end of the line: one short line a fact, so that a death in the middle loses none before it."""

    def __init__(self, line: socket.socket, blocked: Iterable[str] = ()) -> None:
        self._line = line
        self.blocked = frozenset(blocked)

    def begin(self, identities: Iterable[str]) -> None:
        """Tell that work on these pictures begins."""
        self._write("+", identities)

    def end(self, identities: Iterable[str]) -> None:
        """Tell that it ended."""
        self._write("-", identities)

    def ready(self) -> None:
        """Tell that the model is loaded and warm."""
        self._write("r", [""])

    def _write(self, sign: str, identities: Iterable[str]) -> None:
        data = "".join(f"{sign}{identity}\n" for identity in identities)
        try:
            self._line.sendall(data.encode())
        except OSError:
            # The parent is gone. Whoever watches the other direction of this line ends the server.
            return


class Account:
    """The parent's book: pictures in flight in this child, and how many deaths each was in flight at."""

    def __init__(self) -> None:
        self._flying: Counter[str] = Counter()
        self._deaths: OrderedDict[str, int] = OrderedDict()
        self._rest = b""
        self.ready = False

    @property
    def blocked(self) -> list[str]:
        """Pictures that later children refuse."""
        return [identity for identity, deaths in self._deaths.items() if deaths >= DEATHS_TO_BLOCK]

    def read(self, data: bytes) -> None:
        """Take in what came over the line; lines may be cut anywhere."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            sign, identity = line[:1], line[1:].decode("ascii", "replace")
            if sign == b"r":
                self.ready = True
            elif sign == b"+":
                self._flying[identity] += 1
            elif self._flying[identity] > 1:
                self._flying[identity] -= 1
            else:
                del self._flying[identity]

    def close(self, *, died: bool) -> None:
        """The child ended; when it died, what was in flight is remembered."""
        for identity in self._flying if died else ():
            self._deaths[identity] = self._deaths.pop(identity, 0) + 1
        while len(self._deaths) > REMEMBERED:
            self._deaths.popitem(last=False)
        self._flying.clear()
        self._rest = b""
        self.ready = False
