"""What the small files of a system say, and those of the control groups this process is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def read(path: Path) -> str:
    """The text of a file; empty where there is none, or none that may be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group and of those above it, of version 2 or 1; `root` has /proc and /sys."""
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may be the host's: what counts then lies at the mount itself.
        folder = mount / group.strip("/")
        yield from (level for level in (folder, *folder.parents) if level.is_relative_to(mount))
