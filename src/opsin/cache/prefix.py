"""Which sequence holds which beginning of a prompt, running or idle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from opsin.cache.units import Unit, shared_units


@dataclass(slots=True, eq=False)
class Prefix:
    """What a sequence holds. `units` grow while it is filled; `idle` once nobody answers on it any more.

    `planned` are all units that its prompt will hold when it is filled: whoever shares more of those than is there
    already may wait for it. `used` is a counter that orders use, not a time.
    """

    seq_id: int
    units: list[Unit] = field(default_factory=list)
    planned: tuple[Unit, ...] = ()
    idle: bool = False
    used: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """The longest common beginning: `ready` units of it are there, `coming` will be when `prefix` is filled."""

    prefix: Prefix
    ready: int
    coming: int


class Prefixes(Protocol):
    """The contract of the index and of its trivial twin."""

    def match(self, units: tuple[Unit, ...]) -> Match | None:
        """Who shares the longest beginning, with at least one unit behind the salt; ties go to who has more ready."""
        ...

    def add(self, prefix: Prefix) -> None:
        """A sequence begins to be filled."""
        ...

    def touch(self, prefix: Prefix) -> None:
        """It was used now."""
        ...

    def remove(self, prefix: Prefix) -> None:
        """Its cells are gone; twice does no harm."""
        ...

    def oldest_idle(self) -> Prefix | None:
        """The idle one that was used longest ago."""
        ...

    def idle_within(self, prefix: Prefix) -> list[Prefix]:
        """Idle ones that this one begins with: nobody will ask for them any more."""
        ...


class PrefixIndex:
    """At most a few hundred sequences exist (llama.cpp's limit is 256), so a look at each is quick enough."""

    def __init__(self) -> None:
        self._prefixes: dict[int, Prefix] = {}
        self._clock = 0

    def match(self, units: tuple[Unit, ...]) -> Match | None:
        """See Prefixes. The salt at the start must be equal, and alone is no match."""
        best: Match | None = None
        wanted = list(units)  # a list never equals a tuple
        for prefix in self._prefixes.values():
            if not prefix.planned or prefix.planned[0] != units[0]:
                continue
            ready = shared_units(prefix.units, wanted)
            coming = ready if prefix.idle else max(ready, shared_units(prefix.planned, units))
            if coming > 1 and (best is None or (coming, ready) > (best.coming, best.ready)):
                best = Match(prefix, ready, coming)
        return best

    def add(self, prefix: Prefix) -> None:
        """See Prefixes."""
        self._prefixes[prefix.seq_id] = prefix
        self.touch(prefix)

    def touch(self, prefix: Prefix) -> None:
        """See Prefixes."""
        self._clock += 1
        prefix.used = self._clock

    def remove(self, prefix: Prefix) -> None:
        """See Prefixes."""
        if self._prefixes.get(prefix.seq_id) is prefix:
            del self._prefixes[prefix.seq_id]

    def oldest_idle(self) -> Prefix | None:
        """See Prefixes."""
        return min((p for p in self._prefixes.values() if p.idle), key=lambda p: p.used, default=None)

    def idle_within(self, prefix: Prefix) -> list[Prefix]:
        """See Prefixes."""
        return [
            p for p in self._prefixes.values() if p.idle and p is not prefix and p.units == prefix.units[: len(p.units)]
        ]


class NoPrefixes:
    """The twin that never matches and keeps nothing: the control of tests and benchmarks."""

    def match(self, units: tuple[Unit, ...]) -> Match | None:  # noqa: ARG002 - the contract's signature
        """Nobody shares anything."""
        return None

    def add(self, prefix: Prefix) -> None:
        """Nothing is kept."""

    def touch(self, prefix: Prefix) -> None:
        """Nothing is ordered."""

    def remove(self, prefix: Prefix) -> None:
        """Nothing was kept."""

    def oldest_idle(self) -> Prefix | None:
        """Nobody is idle."""
        return None

    def idle_within(self, prefix: Prefix) -> list[Prefix]:  # noqa: ARG002 - the contract's signature
        """Nobody is idle."""
        return []
