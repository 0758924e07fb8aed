"""How many threads compute best when nobody says: one for each physical core that this process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsin.native.library import Library

# Below this, threads wait for each other longer than they compute: measured with the 4 M demo model on 2 cores, a
# decode step takes 0.25 ms with one thread and 0.36 with two, and 9 ms with two when other programs use the cores.
SMALL_PARAMETERS = 20_000_000
_PAUSE_SOFT = 1  # omp_pause_soft: what was set stays


def default_threads(parameters: int) -> int:
    """Threads for a model of that many parameters: one for a small one, else one for each physical core."""
    return 1 if parameters < SMALL_PARAMETERS else physical_cores()


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores, counted by sibling sets on Linux and asked of the kernel on macOS; else the logical count."""
    if sys.platform == "darwin":
        return _darwin_cores() or os.cpu_count() or 1
    if sys.platform == "win32":
        return os.cpu_count() or 1
    usable = os.sched_getaffinity(0)
    try:
        return len({(topology / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in usable})
    except OSError:
        return len(usable)


def pause_threads(lib: Library) -> None:
    """End the OpenMP threads that wait for work of the calling thread, where ggml was built with OpenMP.

    Each thread that computes has a team of its own, and libgomp stops spinning as soon as more threads than cores
    belong to teams: a second engine in a process would make the first half as fast while it does nothing.
    """
    if lib.pause is not None:
        lib.pause(_PAUSE_SOFT)


def _darwin_cores() -> int:
    # Performance cores, where there are such: work split evenly over fast and slow cores waits for the slow ones.
    command = ("/usr/sbin/sysctl", "-n", "hw.perflevel0.physicalcpu", "hw.physicalcpu")
    counts = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()  # noqa: S603 - fixed
    return int(counts[0]) if counts else 0
