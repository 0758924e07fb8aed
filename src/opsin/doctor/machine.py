"""What this machine has: GPUs with their drivers, CPU instructions, cores and the limits on them, and build tools."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from opsin.doctor.files import control_groups, read
from opsin.doctor.gpus import Access, Gpu, read_gpus
from opsin.native.threads import physical_cores

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
class Machine:
    """A machine and the Python that looks at it.

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


def read_machine(access: Access | None = None) -> Machine:
    """Look at this machine; asks `nvidia-smi`, `vulkaninfo` and `sysctl` where they are. Never raises."""
    access = access or here()
    cpu, features = _cpu(access)
    cores = os.cpu_count() or 1
    return Machine(
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
