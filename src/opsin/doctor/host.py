"""What this host has: GPUs with what keeps a program from using one, CPU instructions, cores, and build tools."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from opsin.native.devices import Device, control_groups
from opsin.native.devices import read_system_file as read
from opsin.native.threads import physical_cores

MIB, GIB = 1 << 20, 1 << 30
NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"
TOOLS = ("nvcc", "hipconfig", "glslc", "uv")

# The kernel's names of instructions, and ggml's: /proc/cpuinfo on x86-64 and on ARM, `sysctl hw.optional` on macOS.
_FEATURES = {
    **{name.lower(): name for name in ("AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX_VNNI", "AVX512_BF16")},
    "avx512_vnni": "AVX512_VNNI",
    "amx_int8": "AMX_INT8",
    "avx512f": "AVX512",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "hw.optional.arm.FEAT_DotProd": "DOTPROD",
    "hw.optional.arm.FEAT_I8MM": "MATMUL_INT8",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that is here. `kind` is the backend that suits it: CUDA, ROCm, Metal or Vulkan.

    Memory in bytes, 0 where nothing tells. `trouble` is a sentence on why no program can use it as things are, with
    how to fix it; `fix` is the command for that, where there is one.
    """

    kind: str
    name: str
    memory_total: int = 0
    memory_free: int = 0
    driver: str = ""
    integrated: bool = False
    trouble: str = ""
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """How a host is looked at: its root folder, its system, how commands run, and whether a file may be used."""

    root: Path
    system: str
    machine: str
    run: Callable[[list[str]], tuple[int, str] | None]
    may_use: Callable[[Path], bool]


@dataclass(frozen=True, slots=True)
class Host:
    """A host and the Python that looks at it.

    `system` and `machine` are as `platform` names them. `cores` are logical; `allowed` are those this process may run
    on, `quota` is the CPU time it may take in cores (None: no limit), `threads` what Opsin would start. `tools` maps
    the build tools that are here to their paths; `cuda_runtimes` are the major versions of the CUDA libraries.
    """

    system: str = "Linux"
    machine: str = "x86_64"
    python: str = "python"
    pip: bool = True
    gpus: tuple[Gpu, ...] = ()
    cpu: str = ""
    cpu_features: frozenset[str] = frozenset()
    cores: int = 1
    allowed: int = 1
    quota: float | None = None
    threads: int = 1
    tools: Mapping[str, str] = field(default_factory=dict)
    cuda_runtimes: tuple[int, ...] = ()


def run_command(arguments: list[str]) -> tuple[int, str] | None:
    """Exit status and output (both streams) of a command; None where it is not here or takes more than 20 s."""
    program = shutil.which(arguments[0])
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - fixed command lines of this room
            [program, *arguments[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode, done.stdout.decode("utf-8", "replace")


def here(run: Callable[[list[str]], tuple[int, str] | None] = run_command) -> Access:
    """The way to look at this machine."""
    return Access(
        Path("/"), platform.system(), platform.machine(), run, lambda path: os.access(path, os.R_OK | os.W_OK)
    )


def read_host(access: Access | None = None) -> Host:
    """Look at this machine; asks `nvidia-smi`, `vulkaninfo` and `sysctl` where they are. Never raises."""
    access = access or here()
    cpu, features = _cpu(access)
    cores = os.cpu_count() or 1
    return Host(
        system=access.system,
        machine=access.machine,
        python=sys.executable or "python",
        pip=find_spec("pip") is not None,
        gpus=read_gpus(access),
        cpu=cpu,
        cpu_features=features,
        cores=cores,
        allowed=len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores,
        quota=cpu_quota(access.root),
        threads=physical_cores(),
        tools=_tools(access.root),
        cuda_runtimes=_cuda_runtimes(access.root),
    )


def cpu_quota(root: Path) -> float | None:
    """Cores' worth of time that the control group and those above it allow, of version 2 or 1; None: no limit."""
    return min((limit for group in control_groups(root, "cpu") for limit in _quota_of(group)), default=None)


def _quota_of(group: Path) -> list[float]:
    words = read(group / "cpu.max").split() or [
        read(group / "cpu.cfs_quota_us").strip(),
        read(group / "cpu.cfs_period_us").strip(),
    ]
    try:
        quota, period = (float(word) for word in words)
    except ValueError:  # "max", or no such file
        return []
    return [quota / period] if quota > 0 and period > 0 else []


def _cpu(access: Access) -> tuple[str, frozenset[str]]:
    """Name and instructions of the CPU, in ggml's words; empty where the system does not tell."""
    if access.system == "Darwin":
        told = access.run(["sysctl", "machdep.cpu.brand_string", "hw.optional"])
        text = told[1] if told else ""
        pairs = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        on = {name for name, value in pairs.items() if value.strip() == "1"}
        return pairs.get("machdep.cpu.brand_string", ""), frozenset(_FEATURES[name] for name in on & set(_FEATURES))
    name, flags = "", set()
    for line in read(access.root / "proc/cpuinfo").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key in {"flags", "Features"}:
            flags |= set(value.split())
    return name, frozenset(_FEATURES[flag] for flag in flags & set(_FEATURES))


def _tools(root: Path) -> dict[str, str]:
    found = {name: path for name in TOOLS if (path := shutil.which(name))}
    # CUDA's own installer leaves its folder out of the search path.
    if "nvcc" not in found and (root / "usr/local/cuda/bin/nvcc").exists():
        found["nvcc"] = str(root / "usr/local/cuda/bin/nvcc")
    return found


def _cuda_runtimes(root: Path) -> tuple[int, ...]:
    """CUDA's runtime and cuBLAS of one major version: a wheel that was built elsewhere needs both."""
    places = ("usr/local/cuda*/lib64", "usr/local/cuda*/targets/*/lib", "usr/lib/*-linux-gnu", "usr/lib64")
    names = {path.name for place in places for path in root.glob(f"{place}/libcu*.so.[0-9]*")}
    majors = re.findall(r"libcudart\.so\.(\d+)", "\n".join(names))
    return tuple(sorted({int(major) for major in majors if any(n.startswith(f"libcublas.so.{major}") for n in names)}))


# ---- GPUs


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
                fix='sudo usermod -a -G render,video "$(id -un)"',
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
