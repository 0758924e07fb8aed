"""What this host has: GPUs and what keeps a program from using them, CPU instructions, cores, and build tools."""

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
from typing import Any

from opsin.core.files import read_table
from opsin.native.devices import control_groups, physical_cores
from opsin.native.devices import read_system_file as read

AMD = "0x1002"
_AMD_RIGHTS = ("join the groups render and video, then log in again", 'sudo usermod -a -G render,video "$(id -un)"')
TOOLS = ("nvcc", "hipconfig", "glslc", "uv")

KNOWN = read_table(__file__, "machine.toml")
Run = Callable[[list[str]], str]


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU here. `kind` is its backend: CUDA, ROCm or Metal. `trouble` says why no program can use it."""

    kind: str
    name: str
    driver: str = ""
    trouble: str = ""
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """A host and the Python that looks at it. `allowed` cores and CPU time (`quota`, in cores) are this process's."""

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


def run_command(arguments: list[str]) -> str:
    """What a command prints; empty where it is missing, fails, or takes more than 20 s."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed command lines of this file
            arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def read_host(root: Path = Path("/"), run: Run = run_command) -> Host:
    """Look at this machine; `root` has /proc, /sys and /dev, `run` runs `nvidia-smi` and `sysctl`. Never raises."""
    text, cores = read(root / "proc/cpuinfo"), os.cpu_count() or 1
    name = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    # CUDA's own installer leaves its folder out of the search path.
    folders = os.pathsep.join((os.environ.get("PATH") or os.defpath, str(root / "usr/local/cuda/bin")))
    flags = " ".join(re.findall(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE)).split()
    return Host(
        python=sys.executable or "python",
        pip=find_spec("pip") is not None,
        gpus=read_gpus(root, run),
        cpu=name[1] if name else "",
        cpu_features=frozenset(name for flag, name in KNOWN["features"].items() if flag in flags),
        cores=cores,
        allowed=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        quota=cpu_quota(root),
        threads=physical_cores(),
        tools={name: path for name in TOOLS if (path := shutil.which(name, path=folders))},
    )


def cpu_quota(root: Path) -> float | None:
    """Cores' worth of time that the control groups allow; None: no limit."""
    told = [read(group / "cpu.max").split() for group in control_groups(root)]
    return min((int(w[0]) / int(w[1]) for w in told if len(w) == 2 and all(map(str.isdigit, w))), default=None)


def read_gpus(root: Path, run: Run) -> tuple[Gpu, ...]:
    """NVIDIA's cards, AMD's cards, and Apple's GPU, one probe each."""
    if platform.system() == "Darwin":
        if platform.machine() != "arm64":
            return ()
        return (Gpu("Metal", f"{run(['sysctl', '-n', 'machdep.cpu.brand_string']).strip() or 'Apple'} GPU"),)
    return (*_nvidia(root, run), *_amd(root))


def _nvidia(root: Path, run: Run) -> list[Gpu]:
    """By the files of the driver, which cost no time; where it writes none by `nvidia-smi`."""
    text = "\n".join(read(file) for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")))
    names = re.findall(r"^Model:\s*(.+)", text, re.MULTILINE)
    version = re.search(r"\d{3,}\.[\d.]+", read(root / "proc/driver/nvidia/version"))
    rows = [(name, version[0] if version else "") for name in names]
    trouble: dict[str, Any] = {}
    if rows:
        cards = sorted(node.name for node in (root / "dev").glob("nvidia[0-9]*")) or ["nvidia0"]
        trouble = _trouble(root / "dev", ["nvidiactl", *cards], "--gpus all", "ask for the right to it")
    else:
        told = run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
        rows = [(name, driver) for name, _, driver in (line.rpartition(", ") for line in told.splitlines()) if name]
    return [Gpu("CUDA", f"NVIDIA {name.removeprefix('NVIDIA ')}", driver.strip(), **trouble) for name, driver in rows]


def _amd(root: Path) -> list[Gpu]:
    """By the kernel's display driver. A GPU inside a CPU, which has no memory chips of its own, is left out."""
    found = []
    for vendor in sorted((root / "sys/class/drm").glob("card*/device/vendor")):
        device = vendor.parent
        memory = int(read(device / "mem_info_vram_total").strip() or 0)
        # Cards of virtual machines do not tell the maker of their memory either.
        inside = read(device / "mem_info_vram_vendor").strip() in {"", "unknown"} and memory < 8 * 2**30
        if read(vendor).strip() != AMD or inside:
            continue
        name = read(device / "product_name").strip().removeprefix("AMD ") or "GPU"
        nodes = ["kfd", *(f"dri/{node.name}" for node in (device / "drm").glob("renderD*"))]
        trouble = _trouble(root / "dev", nodes, "--device /dev/kfd --device /dev/dri", *_AMD_RIGHTS)
        found.append(Gpu("ROCm", f"AMD {name}", **trouble))
    return found


def _trouble(folder: Path, nodes: list[str], option: str, advice: str, fix: str | None = None) -> dict[str, Any]:
    """What keeps programs from these device files, as fields of a Gpu; none where all can be opened."""
    for node in nodes:
        if not (folder / node).exists():
            return {"trouble": f"/dev/{node} is not here: start the container with {option}"}
        if not os.access(folder / node, os.R_OK | os.W_OK):
            return {"trouble": f"this user may not open /dev/{node}: {advice}", "fix": fix}
    return {}
