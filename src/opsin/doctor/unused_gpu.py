"""Is there a GPU in this machine that this build cannot use? One sentence, with the exact command."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from opsin.native import devices

PACKAGE = "llama-cpp-python"
FLAGS = {"CUDA": "-DGGML_CUDA=on", "ROCm": "-DGGML_HIP=on", "Metal": "-DGGML_METAL=on"}
AMD, NVIDIA_PROC, PCI = "0x1002", "proc/driver/nvidia/gpus", "sys/class/drm"


def gpu_backends() -> list[str]:
    """The kinds of GPU that this build computes on, by ggml's device names (CUDA0 is a CUDA device)."""
    names = {device.name.rstrip("0123456789") for device in devices() if device.is_gpu}
    return sorted("Metal" if name == "MTL" else name for name in names)


def unused_gpu_hint(
    backends: Callable[[], Sequence[str]] = gpu_backends,
    root: Path = Path("/"),
    system: tuple[str, str] | None = None,
) -> str | None:
    """The sentence, or None when every GPU that is here can be used (or none is).

    `backends` gives the names of the GPU backends compiled in; `root` and `system` (operating system, machine) are
    where and what is looked at.
    """
    found = _found(root, system or (platform.system(), platform.machine()))
    if found is None:
        return None
    kind, name = found
    have = {backend.lower() for backend in backends()}
    if kind.lower() in have or "vulkan" in have:
        return None
    command = (
        f'CMAKE_ARGS="{FLAGS[kind]}" {sys.executable} -m pip install '
        f'--force-reinstall --no-deps --no-cache-dir "{PACKAGE}=={version(PACKAGE)}"'
    )
    return f"{name} is here, but this build has no {kind} backend, so it is not used; install one with: {command}"


def _found(root: Path, system: tuple[str, str]) -> tuple[str, str] | None:
    """The kind of backend a GPU in this machine wants, and the GPU's name."""
    if system == ("Darwin", "arm64"):
        return "Metal", "An Apple GPU"
    for card in sorted((root / NVIDIA_PROC).glob("*/information")):
        for line in _read(card).splitlines():
            if line.startswith("Model:"):
                return "CUDA", f"An {line.removeprefix('Model:').strip()}"
    for vendor in sorted((root / PCI).glob("card*/device/vendor")):
        if _read(vendor).strip() == AMD and (root / "sys/class/kfd").exists():
            return "ROCm", "An AMD GPU"
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
