"""The GPUs of this machine, whatever llama.cpp can do with them, and what keeps a program from using one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

MIB = 1 << 20
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
class Reach:
    """How a machine is looked at: its root folder, its system, how commands run, and whether a file may be used."""

    root: Path
    system: str
    machine: str
    run: Callable[[list[str]], tuple[int, str] | None]
    may_use: Callable[[Path], bool]


def read_gpus(reach: Reach) -> tuple[Gpu, ...]:
    """All GPUs, those first that llama.cpp has its fastest backends for."""
    if reach.system == "Darwin":
        return _apple(reach)
    found = [*_nvidia(reach), *_cards(reach)]
    return tuple(sorted(found or _vulkan(reach), key=lambda gpu: ("CUDA", "ROCm", "Vulkan").index(gpu.kind)))


def _apple(reach: Reach) -> tuple[Gpu, ...]:
    translated = reach.machine != "arm64" and (reach.run(["sysctl", "-n", "sysctl.proc_translated"]) or (1, ""))[1]
    if reach.machine != "arm64" and str(translated).strip() != "1":
        return ()
    asked = reach.run(["sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize"])
    lines = asked[1].splitlines() if asked and asked[0] == 0 else []
    gpu = Gpu("Metal", f"{lines[0].strip()} GPU" if lines else "Apple GPU")
    if len(lines) > 1 and lines[1].strip().isdigit():
        gpu = replace(gpu, memory_total=int(lines[1]))
    if reach.machine != "arm64":
        gpu = replace(gpu, trouble="this Python is built for Intel and runs translated: install one for arm64")
    return (gpu,)


def _nvidia(reach: Reach) -> list[Gpu]:
    """By `nvidia-smi`; where it says nothing by the driver's own files, and without a driver by the bus."""
    asked = reach.run(
        ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    )
    listed = [
        line.removeprefix("Model:").strip()
        for card in sorted((reach.root / "proc/driver/nvidia/gpus").glob("*/information"))
        for line in _read(card).splitlines()
        if line.startswith("Model:")
    ]
    version = re.search(r"\d{3,}\.[\d.]+", _read(reach.root / "proc/driver/nvidia/version"))
    trouble = _nvidia_nodes(reach) if listed else ""
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
        for vendor in sorted((reach.root / "sys/bus/pci/devices").glob("*/vendor"))
        # Class 03 is a display controller; NVIDIA's sound and USB functions sit on the same card.
        if _read(vendor).strip() == NVIDIA and _read(vendor.with_name("class")).startswith("0x03")
    ]


def _nvidia_nodes(reach: Reach) -> str:
    nodes = [reach.root / "dev/nvidiactl", *sorted((reach.root / "dev").glob("nvidia[0-9]*"))]
    if len(nodes) < 2 or not nodes[0].exists():
        return "its device files /dev/nvidia* are not here: start the container with --gpus all"
    closed = [node for node in nodes if not reach.may_use(node)]
    return f"this user may not open {_shown(closed[0], reach)}: ask for the right to it" if closed else ""


def _nvidia_row(row: list[str], trouble: str) -> Gpu:
    name, total, free, driver = (cell.strip() for cell in row)
    # Machines with memory shared with the CPU answer "[N/A]".
    return Gpu("CUDA", _named(name), _number(total) * MIB, _number(free) * MIB, driver, trouble=trouble)


def _named(name: str) -> str:
    return name if name.startswith("NVIDIA") else f"NVIDIA {name}"


def _cards(reach: Reach) -> list[Gpu]:
    """AMD's and Intel's, by the kernel's display drivers."""
    found = []
    kfd = (reach.root / "sys/class/kfd").exists()
    for vendor in sorted((reach.root / "sys/class/drm").glob("card*/device/vendor")):
        device, maker = vendor.parent, _read(vendor).strip()
        nodes = [reach.root / "dev/dri" / node.name for node in (device / "drm").glob("renderD*")]
        if maker == AMD:
            total, used = (_number(_read(device / f"mem_info_vram_{word}")) for word in ("total", "used"))
            name = _read(device / "product_name").strip().removeprefix("AMD ")
            gpu = Gpu("ROCm" if kfd else "Vulkan", f"AMD {name or 'GPU'}", total, max(0, total - used))
            nodes += [reach.root / "dev/kfd"] if kfd else []
        elif maker == INTEL:
            # The GPU inside an Intel CPU always sits on the first bus.
            gpu = Gpu("Vulkan", "Intel GPU", integrated=device.resolve().name.startswith("0000:00:"))
        else:
            continue
        found.append(_rights(gpu, nodes, reach))
    return found


def _rights(gpu: Gpu, nodes: list[Path], reach: Reach) -> Gpu:
    for node in nodes:
        shown = _shown(node, reach)
        if not node.exists():
            return replace(
                gpu, trouble=f"its device file {shown} is not here: start the container with --device {shown}"
            )
        if not reach.may_use(node):
            return replace(
                gpu,
                trouble=f"this user may not open {shown}: join the groups render and video, then log in again",
                mend='sudo usermod -a -G render,video "$(id -un)"',
            )
    return gpu


def _vulkan(reach: Reach) -> list[Gpu]:
    """By `vulkaninfo`, for systems whose kernel lists no card (Windows, WSL); software devices are none."""
    asked = reach.run(["vulkaninfo", "--summary"])
    text = asked[1] if asked and asked[0] == 0 else ""
    pairs = re.findall(r"deviceType\s*=\s*PHYSICAL_DEVICE_TYPE_(\w+).*?deviceName\s*=\s*([^\n]+)", text, re.DOTALL)
    return [
        Gpu("Vulkan", name.strip(), integrated=kind == "INTEGRATED_GPU")
        for kind, name in dict.fromkeys(pairs)  # some versions list each device twice
        if kind in {"DISCRETE_GPU", "INTEGRATED_GPU", "VIRTUAL_GPU"}
    ]


def _number(text: str) -> int:
    return int(text) if text.strip().isdigit() else 0


def _shown(path: Path, reach: Reach) -> str:
    return "/" + path.relative_to(reach.root).as_posix()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
