"""Where the computing happened: nodes, share of operations and of time by backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter


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


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the vision encoder and the language model ran, by backend name, and what could not be told."""

    encoder: dict[str, BackendShare]
    language_model: dict[str, BackendShare]
    layers_offloaded: int
    layers: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The shape of `--json`: time, operations, splits and notes only where there are any."""
        plain: dict[str, Any] = TypeAdapter(Placement).dump_python(self, mode="json", exclude_defaults=True)
        return plain
