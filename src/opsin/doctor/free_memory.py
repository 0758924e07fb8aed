"""How much memory is free on each device, as far as this process may use it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from opsin.doctor.files import control_groups, read
from opsin.native import Device
from opsin.native.memory import HOST


def free_memory(devices: Iterable[Device], root: Path = Path("/")) -> dict[str, int]:
    """Bytes that are free by device name, devices that cannot tell left out.

    The host's are what Linux calls available, within the limits of the control groups this process is in; elsewhere
    what ggml says. `root` is where /proc and /sys lie.
    """
    found = {one.name: one.memory_free for one in devices if one.is_gpu and one.memory_total > 0}
    host = _available(root)
    if host is None:
        host = next((one.memory_free for one in devices if one.type == "cpu" and one.memory_total > 0), None)
    if host is not None:
        found[HOST] = min([host, *_left_in_groups(root)])
    return found


def _available(root: Path) -> int | None:
    for line in read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_groups(root: Path) -> list[int]:
    """What each control group above this process has left, files it can drop counted as free; both versions."""
    left = []
    for group in control_groups(root, "memory"):
        limit = (read(group / "memory.max") or read(group / "memory.limit_in_bytes")).strip()
        used = (read(group / "memory.current") or read(group / "memory.usage_in_bytes")).strip()
        if limit.isdigit() and used.isdigit():
            # Version 1 tells the group's own first, and then the total that its limit is for.
            droppable = re.findall(r"^(?:total_)?inactive_file (\d+)", read(group / "memory.stat"), re.MULTILINE)
            left.append(max(0, int(limit) - int(used) + int((droppable or [0])[-1])))
    return left
