"""The exact command that installs llama-cpp-python for this host."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from opsin.doctor.host import Host
from opsin.native import PACKAGE, PINNED

# How a backend is compiled in: its flag, the tool that must be here for it, and where that comes from.
RECIPES = {
    "CUDA": ("-DGGML_CUDA=on", "nvcc", "NVIDIA's CUDA toolkit"),
    "ROCm": ("-DGGML_HIP=on", "hipconfig", "AMD's ROCm with HIP"),
    "Metal": ("-DGGML_METAL=on", "", ""),
    "Vulkan": ("-DGGML_VULKAN=on", "glslc", "the Vulkan SDK"),
    "BLAS": ("-DGGML_BLAS=on", "", ""),
}


def missing_tool(host: Host, backend: str) -> str:
    """What must be installed before that backend can be compiled; empty if nothing is missing."""
    _, tool, source = RECIPES.get(backend, ("", "", ""))
    return f"{tool} of {source}" if tool and tool not in host.tools else ""


def install_command(host: Host, backends: Iterable[str] = (), extra: Sequence[str] = (), *, fresh: bool = False) -> str:
    """A POSIX shell line that compiles the pinned version with these backends and extra CMake flags.

    `fresh`: nothing is installed yet, so dependencies are installed too.
    """
    wanted = sorted({name for name in backends if name in RECIPES})
    flags = [*(RECIPES[name][0] for name in wanted), *extra]
    assignments = []
    if "CUDA" in wanted and host.tools.get("nvcc") == "/usr/local/cuda/bin/nvcc":
        assignments.append("CUDACXX=/usr/local/cuda/bin/nvcc")  # CMake looks in the search path only
    if "ROCm" in wanted and "hipconfig" in host.tools:
        assignments += ['HIPCXX="$(hipconfig -l)/clang"', 'HIP_PATH="$(hipconfig -R)"']
    if flags:
        assignments.append(f'CMAKE_ARGS="{" ".join(flags)}"')
    first = "" if host.pip or "uv" in host.tools else f"{shlex.quote(host.python)} -m ensurepip && "
    # A wheel would ignore the flags.
    words = shlex.join([*_pip(host, fresh=fresh), "--no-binary", PACKAGE])
    return first + " ".join([*assignments, words, f'"{PACKAGE}=={PINNED}"'])


def _pip(host: Host, *, fresh: bool) -> list[str]:
    if not host.pip and "uv" in host.tools:
        again = [] if fresh else ["--reinstall-package", PACKAGE, "--no-deps"]
        return [host.tools["uv"], "pip", "install", "--python", host.python, *again, "--no-cache"]
    again = [] if fresh else ["--force-reinstall", "--no-deps"]
    return [host.python, "-m", "pip", "install", *again, "--no-cache-dir"]
