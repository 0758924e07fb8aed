"""Where the computing happened: nodes, share of operations and of time by backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class BackendShare:
    """What one backend computed. Nodes that compute nothing (views, reshapes) are not counted.

    `ops` counts nodes by operation; `share_of_ops` is by floating-point operations, `share_of_time` by measured time
    (None: not measured). `splits` counts its pieces of the graph; between two, values are copied (0: not counted).
    """

    nodes: int
    share_of_ops: float
    share_of_time: float | None = None
    ops: dict[str, int] = field(default_factory=dict)
    splits: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The shape of `--json`: time, operations and splits only where they are known."""
        row: dict[str, Any] = {"nodes": self.nodes, "share_of_ops": round(self.share_of_ops, 4)}
        if self.share_of_time is not None:
            row["share_of_time"] = round(self.share_of_time, 4)
        return row | ({"ops": dict(self.ops)} if self.ops else {}) | ({"splits": self.splits} if self.splits else {})


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the vision encoder and the language model ran, by backend name, and what could not be told."""

    encoder: dict[str, BackendShare]
    language_model: dict[str, BackendShare]
    layers_offloaded: int
    layers: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The shape of `--json`."""
        return {
            "encoder": {name: share.as_dict() for name, share in self.encoder.items()},
            "language_model": {name: share.as_dict() for name, share in self.language_model.items()},
            "layers_offloaded": self.layers_offloaded,
            "layers": self.layers,
            **({"notes": list(self.notes)} if self.notes else {}),
        }
