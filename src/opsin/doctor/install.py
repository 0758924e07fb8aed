"""llama-cpp-python for this host: versions to keep away from, old build flags, and the exact command to install it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from opsin.doctor.check import shell_line
from opsin.doctor.host import Host
from opsin.native import PACKAGE, PINNED

WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"

# The first and the last version whose encoder stays off the GPU, why, and the thread on github.com that says so.
FAULTS = (
    ((0, 0, 0), (0, 2, 39), "its build never told the encoder about the GPU", "abetlen/llama-cpp-python/pull/1175"),
    ((0, 2, 58), (0, 2, 73), "a macro was renamed in the CUDA build", "abetlen/llama-cpp-python/issues/1324"),
    ((0, 3, 6), (0, 3, 8), "its llama.cpp had switched the GPU off on purpose", "ggml-org/llama.cpp/pull/10896"),
)


def known_bad(version: str) -> str | None:
    """What is wrong with a version such as "0.2.60" or "0.3.7+cu121" whose vision encoder runs on the CPU.

    None for others, and for what is no version.
    """
    match = re.match(r"\s*v?(\d+)\.(\d+)\.(\d+)", version)
    number = tuple(map(int, match.groups())) if match else ()
    for first, last, what, thread in FAULTS:
        if first <= number <= last:
            source = f"https://github.com/{thread}"
            return f"{version} computes the vision encoder on the CPU whatever GPU is here: {what} ({source})"
    return None


# ---- old build flags

# Names that today's build refuses (LLAMA_CUBLAS) or ignores without an error, and what they are called now.
_OLD_NAMES = {
    "CUBLAS": "GGML_CUDA",
    "HIPBLAS": "GGML_HIP",
    "CLBLAST": "GGML_VULKAN",
    "KOMPUTE": "GGML_VULKAN",
    "OPENBLAS": "GGML_BLAS_VENDOR=OpenBLAS -DGGML_BLAS",
}
# LLAMA_… of before that is GGML_… today.
_MOVED = (
    r"CUDA\w*|METAL\w*|NATIVE|RPC|SYCL\w*|CANN|VULKAN|BLAS\w*|ACCELERATE|LLAMAFILE|OPENMP|LTO|STATIC|AVX\w*|FMA|F16C"
)
_OLD = re.compile(rf"-D\s*((?:LLAMA|GGML)_({'|'.join(_OLD_NAMES)})|LLAMA_({_MOVED}))(?=[:=])")


def old_flags(flags: str) -> list[str]:
    """The names in a CMAKE_ARGS value that mean nothing, or something else, to today's build."""
    return [match[1] for match in _OLD.finditer(flags)]


def modern(flags: str) -> str:
    """The value rewritten for today: old names replaced, all else as it is."""
    return _OLD.sub(lambda match: f"-D{_OLD_NAMES[match[2]] if match[2] else f'GGML_{match[3]}'}", flags)


# ---- the command

# How a backend is compiled in: its flag, the tool that must be here for it, and where that comes from.
RECIPES = {
    "CUDA": ("-DGGML_CUDA=on", "nvcc", "NVIDIA's CUDA toolkit"),
    "ROCm": ("-DGGML_HIP=on", "hipconfig", "AMD's ROCm with HIP"),
    "Metal": ("-DGGML_METAL=on", "", ""),
    "Vulkan": ("-DGGML_VULKAN=on", "glslc", "the Vulkan SDK"),
    "SYCL": ("-DGGML_SYCL=on", "", ""),
    "RPC": ("-DGGML_RPC=on", "", ""),
    "OpenCL": ("-DGGML_OPENCL=on", "", ""),
    "BLAS": ("-DGGML_BLAS=on", "", ""),
}

# The prebuilt wheels of the pinned version by its README, newest CUDA first, and the first driver that has all of that
# CUDA (NVIDIA's release notes of each toolkit). A wheel finds libcudart and libcublas of its major version or fails.
CUDA_WHEELS = ((13, "cu130", 580), (12, "cu125", 555), (12, "cu124", 550), (12, "cu122", 535), (12, "cu121", 530))


def missing_tool(host: Host, backend: str) -> str:
    """What must be installed before that backend can be compiled; empty: nothing that is looked for is missing."""
    _, tool, source = RECIPES.get(backend, ("", "", ""))
    return f"{tool} of {source}" if tool and tool not in host.tools else ""


def install_command(host: Host, backends: Iterable[str] = (), extra: Sequence[str] = (), *, fresh: bool = False) -> str:
    """A shell line that compiles the pinned version with these backends (others than the CPU) and extra CMake flags.

    `fresh`: there is none yet, so its dependencies are installed too. The line is for a POSIX shell, on Windows for
    `cmd`. Nothing but a source build is accepted: a wheel would not look at the flags.
    """
    wanted = sorted({name for name in backends if name in RECIPES})
    flags = [*(RECIPES[name][0] for name in wanted), *extra]
    words = [*_pip(host, fresh=fresh), "--no-binary", PACKAGE]
    if host.system == "Windows":
        settings = ["-C", f"cmake.args={';'.join(flags)}"] if flags else []
        return shell_line([*words, *settings, f"{PACKAGE}=={PINNED}"], "Windows")
    assignments = []
    if "CUDA" in wanted and host.tools.get("nvcc", "nvcc") == "/usr/local/cuda/bin/nvcc":
        # CMake looks for nvcc in the search path only.
        assignments.append("CUDACXX=/usr/local/cuda/bin/nvcc")
    if "ROCm" in wanted and "hipconfig" in host.tools:
        assignments += ['HIPCXX="$(hipconfig -l)/clang"', 'HIP_PATH="$(hipconfig -R)"']
    if flags:
        assignments.append(f'CMAKE_ARGS="{" ".join(flags)}"')
    first = "" if host.pip or "uv" in host.tools else f"{shlex.quote(host.python)} -m ensurepip && "
    return first + " ".join([*assignments, shlex.join(words), f'"{PACKAGE}=={PINNED}"'])


def wheel_command(host: Host, driver: str, *, fresh: bool = False) -> str | None:
    """A shell line that installs a prebuilt CUDA wheel; None where none can be right.

    Right is: Linux on x86-64, a driver new enough for the wheel's CUDA, and that CUDA's libraries here. Whether the
    index still holds a wheel of the pinned version only the command itself can tell: it fails then, and changes
    nothing.
    """
    major = driver.partition(".")[0]
    if (host.system, host.machine) != ("Linux", "x86_64") or not major.isdigit():
        return None
    for cuda, folder, oldest in CUDA_WHEELS:
        if cuda in host.cuda_runtimes and int(major) >= oldest:
            # Its dependencies are not on that index.
            index = "--extra-index-url" if fresh else "--index-url"
            only = ["--only-binary", PACKAGE, index, f"{WHEELS}/{folder}"]
            return shlex.join([*_pip(host, fresh=fresh), *only]) + f' "{PACKAGE}=={PINNED}"'
    return None


def _pip(host: Host, *, fresh: bool = False) -> list[str]:
    if not host.pip and "uv" in host.tools:
        anew = [] if fresh else ["--reinstall-package", PACKAGE, "--no-deps"]
        return [host.tools["uv"], "pip", "install", "--python", host.python, *anew, "--no-cache"]
    anew = [] if fresh else ["--force-reinstall", "--no-deps"]
    return [host.python, "-m", "pip", "install", *anew, "--no-cache-dir"]
