"""llama-cpp-python by version: the ones whose vision encoder stays off the GPU, and what old build flags mean today.

The flags were tried against the build files of the pinned version: `cmake -DLLAMA_CUBLAS=on` stops there, and what
CMake then lists as "not used by the project" is said here to be ignored.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

# The first and the last version, what is wrong with them, and the thread that says so.
FAULTS = (
    (
        (0, 0, 0),
        (0, 2, 39),
        "its build never told the vision encoder about the GPU",
        "https://github.com/abetlen/llama-cpp-python/pull/1175",
    ),
    (
        (0, 2, 58),
        (0, 2, 73),
        "a macro was renamed, so a CUDA build left the vision encoder on the CPU",
        "https://github.com/abetlen/llama-cpp-python/issues/1324",
    ),
    (
        (0, 3, 6),
        (0, 3, 8),
        "its llama.cpp had switched the GPU off for the vision encoder on purpose",
        "https://github.com/ggml-org/llama.cpp/pull/10896",
    ),
)


def known_bad(version: str) -> str | None:
    """What is wrong with a version such as "0.2.60" or "0.3.7+cu121" whose vision encoder runs on the CPU.

    None for others, and for what is no version.
    """
    match = re.match(r"\s*v?(\d+)\.(\d+)\.(\d+)", version)
    if match is None:
        return None
    number = (int(match[1]), int(match[2]), int(match[3]))
    for first, last, what, source in FAULTS:
        if first <= number <= last:
            return f"{version} computes the vision encoder on the CPU whatever GPU is here: {what} ({source})"
    return None


@dataclass(frozen=True, slots=True)
class Translation:
    """An old flag, what to write today (several flags, or empty where nothing takes its place), and why.

    `harmless`: it does no harm where it stands.
    """

    old: str
    new: str
    note: str
    harmless: bool = False


_IGNORED = "today's build ignores it without an error"
_WARNED = "it still works, with a warning"
_RENAMED = {
    "LLAMA_CUBLAS": ("GGML_CUDA", "a fatal error today"),
    "LLAMA_HIPBLAS": ("GGML_HIP", _IGNORED),
    "GGML_HIPBLAS": ("GGML_HIP", _IGNORED),
    "GGML_CUBLAS": ("GGML_CUDA", _IGNORED),
}
# LLAMA_… of before that is GGML_… today.
_PREFIX_WARNED = frozenset({"CUDA", "METAL", "METAL_EMBED_LIBRARY", "NATIVE", "RPC", "SYCL", "SYCL_F16", "CANN"})
_PREFIX_IGNORED = re.compile(
    "VULKAN|BLAS(_VENDOR)?|ACCELERATE|LLAMAFILE|OPENMP|LTO|STATIC|CUDA_FORCE_MMQ|AVX2?|AVX512(_BF16|_VBMI|_VNNI)?|FMA|F16C"
)
_BLAS = "ignored today: OpenBLAS is a vendor of GGML_BLAS"
_CLBLAST = "CLBlast was taken out; for GPUs without CUDA, ROCm or Metal there is Vulkan"
_KOMPUTE = "Kompute was taken out; Vulkan takes its place"
_REPLACED = {
    "LLAMA_OPENBLAS": ("-DGGML_BLAS=on -DGGML_BLAS_VENDOR=OpenBLAS", _BLAS),
    "GGML_OPENBLAS": ("-DGGML_BLAS=on -DGGML_BLAS_VENDOR=OpenBLAS", _BLAS),
    "LLAMA_CLBLAST": ("-DGGML_VULKAN=on", _CLBLAST),
    "GGML_CLBLAST": ("-DGGML_VULKAN=on", _CLBLAST),
    "LLAMA_KOMPUTE": ("-DGGML_VULKAN=on", _KOMPUTE),
    "GGML_KOMPUTE": ("-DGGML_VULKAN=on", _KOMPUTE),
    "LLAMA_MPI": ("", "MPI was taken out; GGML_RPC joins machines today"),
    "LLAMA_CUDA_F16": ("", "ignored today: the kernels choose their type themselves"),
    "GGML_CUDA_F16": ("", "ignored today: the kernels choose their type themselves"),
    "LLAMA_CURL": ("", "llama-cpp-python always builds without curl"),
}
_OFF = {"off", "0", "no", "false", "n", ""}
_LLAVA_ON = "it need not be given: on is the default, and it builds libmtmd, the vision encoder of today"
_LLAVA_OFF = "it leaves out libmtmd, and with it everything that reads pictures"


def translate_flags(flags: str) -> list[Translation]:
    """The old ones of a CMAKE_ARGS value (or a pip `cmake.args`, parted by semicolons), in their order.

    Flags that mean today what they say are left out. Raises nothing: what cannot be parsed is split at spaces.
    """
    found = []
    for flag in split_flags(flags):
        match = re.fullmatch(r"-D\s*(\w+)(?::\w+)?=(.*)", flag)
        if match is None:
            continue
        name, value = match[1], match[2]
        off = value.lower() in _OFF
        if name == "LLAVA_BUILD":
            found.append(Translation(flag, "", _LLAVA_OFF if off else _LLAVA_ON, harmless=not off))
        elif renamed := _renamed(name):
            new, note = renamed
            found.append(Translation(flag, f"-D{new}={value}", f"{name} is {new} now; {note}"))
        elif name in _REPLACED:
            new, note = _REPLACED[name]
            found.append(Translation(flag, "" if off else new, note))
    return found


def _renamed(name: str) -> tuple[str, str] | None:
    word = name.removeprefix("LLAMA_")
    if word != name and word in _PREFIX_WARNED:
        return f"GGML_{word}", _WARNED
    if word != name and _PREFIX_IGNORED.fullmatch(word):
        return f"GGML_{word}", _IGNORED
    return _RENAMED.get(name)


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
