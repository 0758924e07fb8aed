"""Will a pair fit the memory of its devices? Told before a weight is read, and what to change if not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from opsin.core.errors import BadParameter
from opsin.core.model_facts import PairFacts
from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check, Status, serve_command
from opsin.models.facts import read_facts
from opsin.native import Device, cpu_features, devices
from opsin.native.devices import HOST, free_memory
from opsin.native.memory import (
    FULL,
    Needs,
    advice,
    as_flags,
    in_host_memory,
    needed_by_device,
    needed_memory,
    plan_memory,
    size_text,
)

_NAMES = {"kv": "KV cache", "vision_weights": "vision weights", "vision_compute": "vision compute"}


def host_memory(model: Path, mmproj: Path | None, settings: EngineSettings) -> tuple[Needs, int | None]:
    """What the settings need of the host, and how many bytes are free there (None: it does not tell)."""
    plan = needed_memory(read_facts(model, mmproj), devices(), settings, cpu_features())
    return plan.by_device[HOST], free_memory(()).get(HOST)


def room_checks(
    facts: PairFacts,
    present: Sequence[Device],
    settings: EngineSettings,
    cpu_features: frozenset[str] = frozenset(),
    root: Path = Path("/"),
) -> list[Check]:
    """One `room.memory` for each device that takes part and tells what is free."""
    free = free_memory(present, root)
    try:  # what loading would choose; where it would refuse, what the settings need all the same
        plan = plan_memory(facts, present, settings, free=free, cpu_features=cpu_features)
    except BadParameter:
        plan = needed_memory(facts, present, settings, cpu_features)
    in_host = in_host_memory(present)
    needed = needed_by_device(plan, in_host)
    checks = []
    change: Mapping[str, object] | None = None
    for name, needs in sorted(plan.by_device.items()):
        if not needed[name] or name not in free:
            continue
        status = _status(needed[name], free[name])
        fix, message = None, f"{name} has {size_text(free[name])} free, and this setup needs {size_text(needed[name])}"
        if needed[name] > needs.total:
            message += f", {size_text(needed[name] - needs.total)} of it for {', '.join(sorted(in_host))}"
        if status != "ok":
            change = change or advice(facts, present, settings, free=free, cpu_features=cpu_features)
            what = {"warn": "that is tight", "fail": "that does not fit"}[status]
            mend = "use a smaller quantisation or a smaller model"
            if change:
                mend = f"{' '.join(as_flags(change))} would fit"
                fix = serve_command(settings, **change)
            message += f" ({_largest(needs)}): {what}, and {mend if change else f'no setting makes it fit: {mend}'}"
        evidence = {
            "device": name,
            **{f"{key}_bytes": size for key, size in asdict(needs).items()},
            "needed_bytes": needed[name],
            "free_bytes": free[name],
            "context_tokens": plan.ctx,
        }
        checks.append(Check("room.memory", status, message + ".", evidence, fix))
    return checks


def _status(needed: int, free: int) -> Status:
    return "fail" if needed > free else "warn" if needed > FULL * free else "ok"


def _largest(needs: Needs) -> str:
    rows = sorted(((size, _NAMES.get(key, key)) for key, size in asdict(needs).items() if size), reverse=True)
    return ", ".join(f"{name} {size_text(size)}" for size, name in rows[:3])
