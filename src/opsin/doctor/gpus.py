"""The GPUs of this machine, whatever llama.cpp can do with them, and what keeps a program from using one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from opsin.doctor.files import read
from opsin.native import Device

MIB, GIB = 1 << 20, 1 << 30
NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that is here. `kind` is the backend that suits it: CUDA, ROCm, Metal or Vulkan.

    Memory in bytes, 0 where nothing tells. `trouble` is a sentence on why no program can use it as things are, with
    its mend; `mend` is the command for that, where there is one.
    """

    kind: str
    name: str
    memory_total: int = 0
    memory_free: int = 0
    driver: str = ""
    integrated: bool = False
    trouble: str = ""
    mend: str | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """How a machine is looked at: its root folder, its system, how commands run, and whether a file may be used."""

    root: Path
    system: str
    machine: str
    run: Callable[[list[str]], tuple[int, str] | None]
    may_use: Callable[[Path], bool]


def read_gpus(access: Access) -> tuple[Gpu, ...]:
    """All GPUs, those first that llama.cpp has its fastest backends for, and those inside a CPU last."""
    if access.system == "Darwin":
        return _apple(access)
    found = [*_nvidia(access), *_cards(access)]
    order = ("CUDA", "ROCm", "Vulkan")
    return tuple(sorted(found or _vulkan(access), key=lambda gpu: (gpu.integrated, order.index(gpu.kind))))


def in_software(device: Device) -> bool:
    """Whether what ggml sees as a GPU is a driver that computes on the CPU."""
    return any(name in device.description.lower() for name in ("llvmpipe", "lavapipe", "swiftshader"))


def _apple(access: Access) -> tuple[Gpu, ...]:
    translated = access.machine != "arm64" and (access.run(["sysctl", "-n", "sysctl.proc_translated"]) or (1, ""))[1]
    if access.machine != "arm64" and str(translated).strip() != "1":
        return ()
    asked = access.run(["sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize"])
    lines = asked[1].splitlines() if asked and asked[0] == 0 else []
    gpu = Gpu("Metal", f"{lines[0].strip()} GPU" if lines else "Apple GPU")
    if len(lines) > 1 and lines[1].strip().isdigit():
        gpu = replace(gpu, memory_total=int(lines[1]))
    if access.machine != "arm64":
        gpu = replace(gpu, trouble="this Python is built for Intel and runs translated: install one for arm64")
    return (gpu,)


def _nvidia(access: Access) -> list[Gpu]:
    """By `nvidia-smi`; where it says nothing by the driver's own files, and without a driver by the bus."""
    asked = access.run(
        ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    )
    listed = [
        line.removeprefix("Model:").strip()
        for card in sorted((access.root / "proc/driver/nvidia/gpus").glob("*/information"))
        for line in read(card).splitlines()
        if line.startswith("Model:")
    ]
    version = re.search(r"\d{3,}\.[\d.]+", read(access.root / "proc/driver/nvidia/version"))
    trouble = _nvidia_nodes(access) if listed else ""
    if asked and asked[0] == 0:
        rows = [line.rsplit(", ", 3) for line in asked[1].splitlines()]
        return [_nvidia_row(row, trouble) for row in rows if len(row) == 4]
    if listed:
        said = asked[1].strip().splitlines()[0] if asked and asked[1].strip() else ""
        if said and not trouble:
            trouble = f"nvidia-smi says {said!r}: a driver that was updated needs a restart of the machine"
        return [Gpu("CUDA", _named(name), driver=version[0] if version else "", trouble=trouble) for name in listed]
    return [
        Gpu("CUDA", "NVIDIA GPU", trouble="its driver is not loaded: install NVIDIA's driver, or restart after it was")
        for vendor in sorted((access.root / "sys/bus/pci/devices").glob("*/vendor"))
        # Class 03 is a display controller; NVIDIA's sound and USB functions sit on the same card.
        if read(vendor).strip() == NVIDIA and read(vendor.with_name("class")).startswith("0x03")
    ]


def _nvidia_nodes(access: Access) -> str:
    nodes = [access.root / "dev/nvidiactl", *sorted((access.root / "dev").glob("nvidia[0-9]*"))]
    if len(nodes) < 2 or not nodes[0].exists():
        return "its device files /dev/nvidia* are not here: start the container with --gpus all"
    closed = [node for node in nodes if not access.may_use(node)]
    return f"this user may not open {_shown(closed[0], access)}: ask for the right to it" if closed else ""


def _nvidia_row(row: list[str], trouble: str) -> Gpu:
    name, total, free, driver = (cell.strip() for cell in row)
    # Machines with memory shared with the CPU answer "[N/A]".
    return Gpu("CUDA", _named(name), _number(total) * MIB, _number(free) * MIB, driver, trouble=trouble)


def _named(name: str) -> str:
    return name if name.startswith("NVIDIA") else f"NVIDIA {name}"


def _cards(access: Access) -> list[Gpu]:
    """AMD's and Intel's, by the kernel's display drivers."""
    found = []
    kfd = (access.root / "sys/class/kfd").exists()
    for vendor in sorted((access.root / "sys/class/drm").glob("card*/device/vendor")):
        device, maker = vendor.parent, read(vendor).strip()
        nodes = [access.root / "dev/dri" / node.name for node in (device / "drm").glob("renderD*")]
        if maker == AMD:
            total, used = (_number(read(device / f"mem_info_vram_{word}")) for word in ("total", "used"))
            name = read(device / "product_name").strip().removeprefix("AMD ")
            # The kernel knows no maker of the CPU's memory, of which a GPU inside it has a part. Large cards of a
            # virtual machine lack the maker too.
            maker = read(device / "mem_info_vram_vendor").strip()
            inside = maker in {"", "unknown"} and total < 8 * GIB
            kind = "ROCm" if kfd and not inside else "Vulkan"
            gpu = Gpu(kind, f"AMD {name or 'GPU'}", total, max(0, total - used), integrated=inside)
            nodes += [access.root / "dev/kfd"] if kind == "ROCm" else []
        elif maker == INTEL:
            # The GPU inside an Intel CPU always sits on the first bus.
            gpu = Gpu("Vulkan", "Intel GPU", integrated=device.resolve().name.startswith("0000:00:"))
        else:
            continue
        found.append(_rights(gpu, nodes, access))
    return found


def _rights(gpu: Gpu, nodes: list[Path], access: Access) -> Gpu:
    for node in nodes:
        shown = _shown(node, access)
        if not node.exists():
            return replace(
                gpu, trouble=f"its device file {shown} is not here: start the container with --device {shown}"
            )
        if not access.may_use(node):
            return replace(
                gpu,
                trouble=f"this user may not open {shown}: join the groups render and video, then log in again",
                mend='sudo usermod -a -G render,video "$(id -un)"',
            )
    return gpu


def _vulkan(access: Access) -> list[Gpu]:
    """By `vulkaninfo`, for systems whose kernel lists no card (Windows, WSL); software devices are none."""
    asked = access.run(["vulkaninfo", "--summary"])
    text = asked[1] if asked and asked[0] == 0 else ""
    pairs = re.findall(r"deviceType\s*=\s*PHYSICAL_DEVICE_TYPE_(\w+).*?deviceName\s*=\s*([^\n]+)", text, re.DOTALL)
    return [
        Gpu("Vulkan", name.strip(), integrated=kind == "INTEGRATED_GPU")
        for kind, name in dict.fromkeys(pairs)  # some versions list each device twice
        if kind in {"DISCRETE_GPU", "INTEGRATED_GPU", "VIRTUAL_GPU"}
    ]


def _number(text: str) -> int:
    return int(text) if text.strip().isdigit() else 0


def _shown(path: Path, access: Access) -> str:
    return "/" + path.relative_to(access.root).as_posix()
