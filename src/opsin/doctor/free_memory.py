"""How much memory is free on each device, as far as this process may use it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

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
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_groups(root: Path) -> list[int]:
    """What each control group above this process has left, files it can drop counted as free; both versions."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = Path(path.lstrip("/"))
        for group in (base / inner, *(base / parent for parent in inner.parents)):
            limit, used = _text(group / names[0]).strip(), _text(group / names[1]).strip()
            if limit.isdigit() and used.isdigit():
                droppable = re.search(rf"^{names[2]} (\d+)", _text(group / "memory.stat"), re.MULTILINE)
                left.append(max(0, int(limit) - int(used) + (int(droppable[1]) if droppable else 0)))
    return left


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
