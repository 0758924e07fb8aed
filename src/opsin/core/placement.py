"""Where the computing happened: nodes, share of operations and of time by backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class BackendShare:
    """What one backend computed. Nodes that compute nothing (views, reshapes) are not counted.

    `ops` counts computing nodes by operation; `share_of_ops` is by floating-point operations, `share_of_time` by
    measured time (None where it was not measured). `splits` counts the stretches of neighbouring nodes: all backends'
    together are the pieces a graph is cut into, and between two of them values are copied (0: not counted).
    """

    nodes: int
    share_of_ops: float
    share_of_time: float | None = None
    ops: dict[str, int] = field(default_factory=dict)
    splits: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the vision encoder and the language model ran, by backend name, and what could not be told."""

    encoder: dict[str, BackendShare]
    language_model: dict[str, BackendShare]
    layers_offloaded: int
    layers: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The shape of `--json`: `share_of_time`, `ops` and `splits` only where they are known."""
        return {
            "encoder": {name: _share(share) for name, share in self.encoder.items()},
            "language_model": {name: _share(share) for name, share in self.language_model.items()},
            "layers_offloaded": self.layers_offloaded,
            "layers": self.layers,
            **({"notes": list(self.notes)} if self.notes else {}),
        }


def _share(share: BackendShare) -> dict[str, Any]:
    row: dict[str, Any] = {"nodes": share.nodes, "share_of_ops": round(share.share_of_ops, 4)}
    if share.share_of_time is not None:
        row["share_of_time"] = round(share.share_of_time, 4)
    if share.ops:
        row["ops"] = dict(share.ops)
    if share.splits:
        row["splits"] = share.splits
    return row
