"""How many threads compute best when nobody says: one a physical core that this process may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def physical_cores(topology: Path = _TOPOLOGY) -> int:
    """Physical cores, counted by sibling sets on Linux and asked of the kernel on macOS; else the logical count."""
    logical = os.cpu_count() or 1
    if sys.platform == "darwin":
        return _darwin_cores() or logical
    if sys.platform == "win32":
        return logical
    usable = os.sched_getaffinity(0)
    siblings: set[str] = set()
    for cpu in usable:
        try:
            siblings.add((topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            return len(usable)
    return max(1, len(siblings))


def _darwin_cores() -> int:
    import ctypes
    import ctypes.util

    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    value = ctypes.c_int32(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    # Performance cores first: work split evenly over fast and slow cores waits for the slow ones.
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):
        if libc.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0) == 0 and value.value > 0:
            return value.value
    return 0
