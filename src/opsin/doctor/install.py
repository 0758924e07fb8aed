"""llama-cpp-python for this host: versions to keep away from, old build flags, and the exact command to install it.

The flags were tried against the build files of the pinned version: `cmake -DLLAMA_CUBLAS=on` stops there, and what
CMake then lists as "not used by the project" is said here to be ignored.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opsin.doctor.check import shell_line
from opsin.doctor.host import Host
from opsin.native import PACKAGE, PINNED

WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"

_PULL, _ISSUE = "https://github.com/{}/pull/{}", "https://github.com/{}/issues/{}"
# The first and the last version whose encoder stays off the GPU, what is wrong with them, and the thread that says so.
FAULTS = (
    (
        (0, 0, 0),
        (0, 2, 39),
        "its build never told the vision encoder about the GPU",
        _PULL.format("abetlen/llama-cpp-python", 1175),
    ),
    (
        (0, 2, 58),
        (0, 2, 73),
        "a macro was renamed, so a CUDA build left the vision encoder on the CPU",
        _ISSUE.format("abetlen/llama-cpp-python", 1324),
    ),
    (
        (0, 3, 6),
        (0, 3, 8),
        "its llama.cpp had switched the GPU off for the vision encoder on purpose",
        _PULL.format("ggml-org/llama.cpp", 10896),
    ),
)


def known_bad(version: str) -> str | None:
    """What is wrong with a version such as "0.2.60" or "0.3.7+cu121" whose vision encoder runs on the CPU.

    None for others, and for what is no version.
    """
    match = re.match(r"\s*v?(\d+)\.(\d+)\.(\d+)", version)
    number = tuple(map(int, match.groups())) if match else ()
    for first, last, what, source in FAULTS:
        if first <= number <= last:
            return f"{version} computes the vision encoder on the CPU whatever GPU is here: {what} ({source})"
    return None


# ---- old build flags

_IGNORED, _WARNED = "today's build ignores it without an error", "it still works, with a warning"
_WORKING = "CUDA METAL METAL_EMBED_LIBRARY NATIVE RPC SYCL SYCL_F16 CANN"
_WITHOUT = (
    "VULKAN BLAS BLAS_VENDOR ACCELERATE LLAMAFILE OPENMP LTO STATIC CUDA_FORCE_MMQ AVX AVX2 AVX512 AVX512_BF16 "
    "AVX512_VBMI AVX512_VNNI FMA F16C"
)
# Old name -> its name today, and what the build does with the old one.
_RENAMED = {
    **{f"LLAMA_{name}": (f"GGML_{name}", _WARNED) for name in _WORKING.split()},
    **{f"LLAMA_{name}": (f"GGML_{name}", _IGNORED) for name in _WITHOUT.split()},
    "LLAMA_CUBLAS": ("GGML_CUDA", "a fatal error today"),
    "GGML_CUBLAS": ("GGML_CUDA", _IGNORED),
    "LLAMA_HIPBLAS": ("GGML_HIP", _IGNORED),
    "GGML_HIPBLAS": ("GGML_HIP", _IGNORED),
}
_OPENBLAS = ("-DGGML_BLAS=on -DGGML_BLAS_VENDOR=OpenBLAS", "ignored today: OpenBLAS is a vendor of GGML_BLAS")
_CLBLAST = ("-DGGML_VULKAN=on", "CLBlast was taken out; for GPUs without CUDA, ROCm or Metal there is Vulkan")
_KOMPUTE = ("-DGGML_VULKAN=on", "Kompute was taken out; Vulkan takes its place")
# Old name -> the flags that take its place (empty: none), and why.
_REPLACED = {
    **dict.fromkeys(("LLAMA_OPENBLAS", "GGML_OPENBLAS"), _OPENBLAS),
    **dict.fromkeys(("LLAMA_CLBLAST", "GGML_CLBLAST"), _CLBLAST),
    **dict.fromkeys(("LLAMA_KOMPUTE", "GGML_KOMPUTE"), _KOMPUTE),
    **dict.fromkeys(
        ("LLAMA_CUDA_F16", "GGML_CUDA_F16"), ("", "ignored today: the kernels choose their type themselves")
    ),
    "LLAMA_MPI": ("", "MPI was taken out; GGML_RPC joins machines today"),
    "LLAMA_CURL": ("", "llama-cpp-python always builds without curl"),
}
_LLAVA_ON = "it need not be given: on is the default, and it builds libmtmd, the vision encoder of today"
_LLAVA_OFF = "it leaves out libmtmd, and with it everything that reads images"


@dataclass(frozen=True, slots=True)
class OldFlag:
    """An old flag, what to write today (several flags, or empty where nothing takes its place), and why.

    `harmless`: it does no harm where it stands.
    """

    old: str
    new: str
    note: str
    harmless: bool = False


def translate_flags(flags: str) -> list[OldFlag]:
    """The old ones of a CMAKE_ARGS value (or a pip `cmake.args`, parted by semicolons), in their order.

    Flags that mean today what they say are left out. Raises nothing: what cannot be parsed is split at spaces.
    """
    found = []
    for flag in split_flags(flags):
        match = re.fullmatch(r"-D\s*(\w+)(?::\w+)?=(.*)", flag)
        if match is None:
            continue
        name, value = match[1], match[2]
        off = value.lower() in {"off", "0", "no", "false", "n", ""}
        if name == "LLAVA_BUILD":
            found.append(OldFlag(flag, "", _LLAVA_OFF if off else _LLAVA_ON, harmless=not off))
        elif name in _RENAMED:
            new, note = _RENAMED[name]
            found.append(OldFlag(flag, f"-D{new}={value}", f"{name} is {new} now; {note}"))
        elif name in _REPLACED:
            new, note = _REPLACED[name]
            found.append(OldFlag(flag, "" if off else new, note))
    return found


def split_flags(flags: str) -> list[str]:
    """The flags one by one, as scikit-build-core splits CMAKE_ARGS, and at `;` before -D; -D joined to its name."""
    # A semicolon elsewhere parts the items of one value: -DCMAKE_CUDA_ARCHITECTURES=86;89.
    flags = re.sub(r";(?=\s*-D|\s*$)", " ", flags)
    try:
        words = shlex.split(flags)
    except ValueError:  # an odd quote
        words = flags.split()
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "-D":
            joined[-1] = "-D" + word
        else:
            joined.append(word)
    return joined


def modern(flags: str) -> str:
    """The whole value rewritten for today: old flags replaced, the others kept."""
    new = {item.old: item.new for item in translate_flags(flags)}
    return " ".join(filter(None, (new.get(flag, shlex.quote(flag)) for flag in split_flags(flags))))


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


def install_command(
    host: Host, backends: Iterable[str] = (), extra: Sequence[str] = (), *, fresh: bool = False
) -> str:
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
