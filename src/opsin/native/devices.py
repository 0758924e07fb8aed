"""The devices that this build of ggml can compute on."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from opsin.core.errors import BadParameter
from opsin.native.library import Library, library

_TYPES = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel", 4: "meta"}
CPU_NAMES = frozenset({"none", "cpu"})
HOST = "CPU"
"""The name under which the memory of the host is counted."""


@dataclass(frozen=True, slots=True)
class Device:
    """A ggml device: `type` is cpu, gpu, igpu, accel or meta; memory in bytes (0 where ggml cannot tell)."""

    name: str
    description: str
    type: str
    memory_free: int
    memory_total: int
    handle: int

    @property
    def is_gpu(self) -> bool:
        """Whether layers can be offloaded to it."""
        return self.type in {"gpu", "igpu"}


def devices(lib: Library | None = None) -> tuple[Device, ...]:
    """All devices, in ggml's order. Raises NativeMismatch."""
    ggml = (lib or library()).ggml

    def device(handle: int) -> Device:
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        name, described = ggml.ggml_backend_dev_name(handle), ggml.ggml_backend_dev_description(handle)
        kind = _TYPES.get(ggml.ggml_backend_dev_type(handle), "unknown")
        return Device(name.decode(), described.decode(), kind, free.value, total.value, handle)

    return tuple(device(ggml.ggml_backend_dev_get(index)) for index in range(ggml.ggml_backend_dev_count()))


def pick(name: str, option: str, present: tuple[Device, ...]) -> Device | None:
    """The device of that name, None for "none" and "cpu". Raises BadParameter, which lists what is here."""
    wanted = name.strip().lower()
    if wanted in CPU_NAMES:
        return None
    for device in present:
        if device.name.lower() == wanted:
            return device
    here = ", ".join(device.name for device in present if device.is_gpu)
    raise BadParameter(
        f"There is no device {name!r} for {option}: "
        + (f"this build sees {here}, or give none for the CPU." if here else "this build of llama.cpp sees no GPU.")
    )


def free_memory(present: Iterable[Device], root: Path = Path("/")) -> dict[str, int]:
    """Free bytes by device name; devices that cannot tell are left out. `root` is where /proc and /sys lie.

    The host's are what Linux calls available, within the limits of this process's control groups; elsewhere ggml's.
    """
    present = tuple(present)
    found = {one.name: one.memory_free for one in present if one.is_gpu and one.memory_total > 0}
    meminfo = re.search(r"^MemAvailable:\s+(\d+)", read_system_file(root / "proc/meminfo"), re.MULTILINE)
    told = [one.memory_free for one in present if one.type == "cpu" and one.memory_total > 0]
    host = [int(meminfo[1]) * 1024] if meminfo else told[:1]
    if host:
        found[HOST] = min([*host, *(left for group in control_groups(root) for left in _left_in_group(group))])
    return found


def _left_in_group(group: Path) -> list[int]:
    """What a control group has left; files it can drop are counted as free."""
    limit, used = (read_system_file(group / f"memory.{name}").strip() for name in ("max", "current"))
    if not (limit.isdigit() and used.isdigit()):
        return []
    droppable = re.search(r"^inactive_file (\d+)", read_system_file(group / "memory.stat"), re.MULTILINE)
    return [max(0, int(limit) - int(used) + (int(droppable[1]) if droppable else 0))]


def read_system_file(path: Path) -> str:
    """The text of a file; empty where it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def control_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control group (version 2) and of those above it; `root` has /proc and /sys."""
    found = re.search(r"^0::(.*)", read_system_file(root / "proc/self/cgroup"), re.MULTILINE)
    mount = root / "sys/fs/cgroup"
    if found:
        # In a container the path may be the host's: what counts then lies at the mount itself.
        folder = mount / found[1].strip("/")
        yield from (level for level in (folder, *folder.parents) if level.is_relative_to(mount))
