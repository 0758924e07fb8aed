"""A child process that ends with its parent, whatever it is doing."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process as soon as the process with this id, its parent, has ended.

    Linux alone can do that; elsewhere whoever reads from the parent has to notice. On Linux it also helps a process
    that was stopped, or that native code keeps from running any Python.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before that
        os._exit(0)
