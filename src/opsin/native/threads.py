"""How many threads compute best when nobody says: one a physical core that this process may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsin.native.library import Library

# Below this, threads wait for each other longer than they compute: measured with the 4 M demo model on 2 cores, a
# decode step takes 0.25 ms with one thread and 0.36 with two, and 9 ms with two when other programs use the cores.
SMALL_PARAMETERS = 20_000_000
_TOPOLOGY = Path("/sys/devices/system/cpu")
_PAUSE_SOFT = 1  # omp_pause_soft: what was set stays


def default_threads(parameters: int) -> int:
    """Threads for a model of that many parameters: one for a small one, else one a physical core."""
    return 1 if parameters < SMALL_PARAMETERS else physical_cores()


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


def rest(lib: Library) -> None:
    """End the OpenMP threads that wait for work of the calling thread.

    Each thread that computes has a team of its own, and libgomp stops spinning as soon as more threads than cores
    belong to teams: a second engine in a process would make the first half as fast while it does nothing.
    `omp_pause_resource_all` is OpenMP 5.0's; where ggml was built without OpenMP there is nothing to end.
    """
    pause = lib.pause
    if pause is not None:
        pause(_PAUSE_SOFT)


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
