"""The devices that this build of ggml can compute on."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from opsin.core.errors import BadParameter
from opsin.native.library import Library, library

_TYPES = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel", 4: "meta"}
CPU_NAMES = frozenset({"none", "cpu"})


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
    found = []
    for index in range(ggml.ggml_backend_dev_count()):
        handle = ggml.ggml_backend_dev_get(index)
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                name=ggml.ggml_backend_dev_name(handle).decode(),
                description=ggml.ggml_backend_dev_description(handle).decode(),
                type=_TYPES.get(ggml.ggml_backend_dev_type(handle), "unknown"),
                memory_free=free.value,
                memory_total=total.value,
                handle=handle,
            )
        )
    return tuple(found)


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
