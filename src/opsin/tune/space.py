"""What is tried: few candidates of each setting, chosen by what the machine has and the model is like."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.core.backend import BackendLimits
from opsin.core.errors import OpsinError
from opsin.tune.pareto import Profile
from opsin.tune.projector import TYPES, ProjectorType
from opsin.tune.rig import Sized
from opsin.tune.search import Choice, Dimension

SHARING: dict[str, Choice] = {}
"""How encode and decode may share the machine where throughput is what counts."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wanted of a tuning; `fixed` are settings that the user chose and that stay.

    `cores` are logical ones, `gpus` go by ggml's names.
    """

    profile: Profile
    fixed: frozenset[str] = frozenset()
    minutes: float = 10.0
    allow_approximate: bool = False
    cores: int = 1
    gpus: tuple[str, ...] = ()


def dimensions(wish: Wish, facts: Sized, convert: Callable[[Path, ProjectorType], Path | None]) -> list[Dimension]:
    """In the order in which they are tried: first what wins most for the least time.

    `convert` writes a projector of another type, None where it would be the same.
    """
    threads = sorted({1, max(1, wish.cores // 2), wish.cores})
    types = ("q8_0", "q4_0") if wish.allow_approximate else ("q8_0",)
    found = [
        Dimension("threads of encode", "encode", _each("threads_encode", threads)),
        Dimension("flash attention", "language", (_other_attention(facts.limits),), checked=True),
        Dimension("rows of prefill", "language", _rows(facts)),
        Dimension("threads of prefill", "language", _each("threads_batch", threads)),
        Dimension("threads of decode", "language", _each("threads", threads)),
        Dimension("flash attention of vision", "encode", _each("vision_flash_attention", (False,)), checked=True),
        Dimension("KV memory", "language", _each("kv_type", types), checked=True),
    ]
    if wish.gpus:
        found += [
            Dimension("layers on the GPU", "language", _each("gpu_layers", (0,)), checked=True),
            # Untuned it is the first one.
            Dimension(
                "device of the encoder", "encode", _each("mmproj_device", [*wish.gpus[1:], "none"]), checked=True
            ),
        ]
    if len(wish.gpus) > 1:
        found.append(Dimension("device", "language", _each("device", wish.gpus), checked=True))
    if facts.settings.mmproj is not None and "mmproj" not in wish.fixed:
        made = (_converted(facts.settings.mmproj, kind, convert) for kind in TYPES)
        found.insert(1, Dimension("type of the projector", "encode", tuple(filter(None, made)), checked=True))
    open_ones = (
        Dimension(one.name, one.part, tuple(c for c in one.candidates if not c.keys() & wish.fixed), one.checked)
        for one in found
    )
    return [one for one in open_ones if one.candidates]


def _each(name: str, values: Collection[Any]) -> tuple[Choice, ...]:
    return tuple({name: value} for value in values)


def _other_attention(limits: BackendLimits) -> Choice:
    """What the untuned settings do not do: flash attention is off with memories of their own, and on elsewhere.

    The encoder would follow where it is switched off.
    """
    return {"flash_attention": False, "vision_flash_attention": True} if limits.shared else {"flash_attention": True}


def _rows(facts: Sized) -> tuple[Choice, ...]:
    """Steps of a prefill: half, one and a half and a whole picture, where steps are smaller than pictures; and less."""
    limits, whole = facts.limits, facts.image_tokens
    if not limits.best_rows:
        return tuple({"ubatch": rows} for rows in (256, 512, 2048) if rows != limits.n_ubatch)
    wanted = sorted({limits.best_rows // 2, limits.best_rows * 3 // 2, whole})
    # A micro-batch must hold the rows, and buffers are made in multiples of 64.
    return tuple({"ubatch": max(limits.n_ubatch, -(-rows // 64) * 64)} for rows in wanted)


def _converted(
    source: Path, kind: ProjectorType, convert: Callable[[Path, ProjectorType], Path | None]
) -> Choice | None:
    try:
        made = convert(source, kind)
    except OpsinError:  # a disk without room leaves the other candidates
        return None
    return None if made is None else {"mmproj": made}
