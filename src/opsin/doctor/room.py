"""Will a pair fit the memory of its devices? Told by the planner before a weight is read, with what would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from opsin.core.errors import BadParameter
from opsin.core.model_facts import PairFacts
from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check, Status, serve_command
from opsin.native import Device
from opsin.native.devices import free_memory
from opsin.native.memory import FULL, MemoryPlanner, as_flags, needed_by_device, size_text


def room_checks(
    facts: PairFacts,
    present: Sequence[Device],
    settings: EngineSettings,
    cpu_features: frozenset[str] = frozenset(),
    root: Path = Path("/"),
) -> list[Check]:
    """One `room.memory` for each device that takes part and tells how much is free; `root` has /proc and /sys."""
    free = free_memory(present, root)
    planner = MemoryPlanner(facts, present, settings, free, cpu_features)
    try:  # what loading would choose; where it would refuse, what the settings need
        plan = planner.plan()
    except BadParameter:
        plan = planner.needed()
    checks = []
    for name, size in sorted(needed_by_device(plan, present).items()):
        if not size or name not in free:
            continue
        parts = {f"{key}_bytes": value for key, value in asdict(plan.by_device[name]).items()}
        evidence = {"device": name, **parts, "needed_bytes": size, "free_bytes": free[name]}
        message = f"{name} has {size_text(free[name])} free, and this setup needs {size_text(size)}"
        if size <= FULL * free[name]:
            checks.append(Check("room.memory", "ok", f"{message}.", evidence))
            continue
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        told = ", ".join(f"{key.removesuffix('_bytes').replace('_', ' ')} {size_text(value)}" for key, value in largest)
        change = planner.advice()
        mend = f"{' '.join(as_flags(change))} would fit" if change else "no setting makes it fit, use a smaller model"
        fix = serve_command(settings, **change) if change else None
        status: Status = "fail" if size > free[name] else "warn"
        checks.append(Check("room.memory", status, f"{message} ({told}): {mend}.", evidence, fix))
    return checks
