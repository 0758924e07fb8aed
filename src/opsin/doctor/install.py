"""The exact command that installs the llama-cpp-python that Opsin needs, for this machine and these backends."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opsin.doctor.machine import Machine
from opsin.doctor.shell import shell_line
from opsin.native import PACKAGE, PINNED

WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a backend is compiled in: its flag, the tool that must be here for it, and where that comes from."""

    flag: str
    tool: str = ""
    comes_with: str = ""


RECIPES = {
    "CUDA": Recipe("-DGGML_CUDA=on", "nvcc", "NVIDIA's CUDA toolkit"),
    "ROCm": Recipe("-DGGML_HIP=on", "hipconfig", "AMD's ROCm with HIP"),
    "Metal": Recipe("-DGGML_METAL=on"),
    "Vulkan": Recipe("-DGGML_VULKAN=on", "glslc", "the Vulkan SDK"),
    "SYCL": Recipe("-DGGML_SYCL=on"),
    "RPC": Recipe("-DGGML_RPC=on"),
    "OpenCL": Recipe("-DGGML_OPENCL=on"),
    "BLAS": Recipe("-DGGML_BLAS=on"),
}

# The prebuilt wheels of the pinned version by its README, newest CUDA first, and the first driver that has all of that
# CUDA (NVIDIA's release notes of each toolkit). A wheel finds libcudart and libcublas of its major version or fails.
CUDA_WHEELS = ((13, "cu130", 580), (12, "cu125", 555), (12, "cu124", 550), (12, "cu122", 535), (12, "cu121", 530))


def missing_tool(machine: Machine, backend: str) -> str:
    """What must be installed before that backend can be compiled; empty: nothing that is looked for is missing."""
    recipe = RECIPES.get(backend)
    if recipe is None or not recipe.tool or recipe.tool in machine.tools:
        return ""
    return f"{recipe.tool} of {recipe.comes_with}"


def install_command(
    machine: Machine, backends: Iterable[str] = (), extra: Sequence[str] = (), *, fresh: bool = False
) -> str:
    """A shell line that compiles the pinned version with these backends (others than the CPU) and extra CMake flags.

    `fresh`: there is none yet, so its dependencies are installed too. The line is for a POSIX shell, on Windows for
    `cmd`. Nothing but a source build is accepted: a wheel would not look at the flags.
    """
    wanted = sorted({name for name in backends if name in RECIPES})
    flags = [*(RECIPES[name].flag for name in wanted), *extra]
    from_source = ["--no-binary", PACKAGE]
    if machine.system == "Windows":
        settings = ["-C", f"cmake.args={';'.join(flags)}"] if flags else []
        return shell_line([*_pip(machine, fresh=fresh), *from_source, *settings, f"{PACKAGE}=={PINNED}"], "Windows")
    assignments = []
    if "CUDA" in wanted and machine.tools.get("nvcc", "nvcc") == "/usr/local/cuda/bin/nvcc":
        # CMake looks for nvcc in the search path only.
        assignments.append("CUDACXX=/usr/local/cuda/bin/nvcc")
    if "ROCm" in wanted and "hipconfig" in machine.tools:
        assignments += ['HIPCXX="$(hipconfig -l)/clang"', 'HIP_PATH="$(hipconfig -R)"']
    if flags:
        assignments.append(f'CMAKE_ARGS="{" ".join(flags)}"')
    command = shlex.join([*_pip(machine, fresh=fresh), *from_source]) + f' "{PACKAGE}=={PINNED}"'
    first = "" if machine.pip or "uv" in machine.tools else f"{shlex.quote(machine.python)} -m ensurepip && "
    return first + " ".join([*assignments, command])


def wheel_command(machine: Machine, driver: str, *, fresh: bool = False) -> str | None:
    """A shell line that installs a prebuilt CUDA wheel; None where none can be right.

    Right is: Linux on x86-64, a driver new enough for the wheel's CUDA, and that CUDA's libraries here. Whether the
    index still holds a wheel of the pinned version only the command itself can tell: it fails then, and changes
    nothing.
    """
    major = driver.partition(".")[0]
    if (machine.system, machine.machine) != ("Linux", "x86_64") or not major.isdigit():
        return None
    for cuda, folder, oldest in CUDA_WHEELS:
        if cuda in machine.cuda_runtimes and int(major) >= oldest:
            # Its dependencies are not on that index.
            index = "--extra-index-url" if fresh else "--index-url"
            only = ["--only-binary", PACKAGE, index, f"{WHEELS}/{folder}"]
            return shlex.join([*_pip(machine, fresh=fresh), *only]) + f' "{PACKAGE}=={PINNED}"'
    return None


def _pip(machine: Machine, *, fresh: bool = False) -> list[str]:
    if not machine.pip and "uv" in machine.tools:
        anew = [] if fresh else ["--reinstall-package", PACKAGE, "--no-deps"]
        return [machine.tools["uv"], "pip", "install", "--python", machine.python, *anew, "--no-cache"]
    anew = [] if fresh else ["--force-reinstall", "--no-deps"]
    return [machine.python, "-m", "pip", "install", *anew, "--no-cache-dir"]
