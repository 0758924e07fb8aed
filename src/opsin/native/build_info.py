"""What the installed llama.cpp says of itself: versions, backends, CPU instructions, devices, and how it was built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from opsin.core.errors import NativeMismatch
from opsin.native import abi
from opsin.native.devices import Device, devices
from opsin.native.library import Library, library

PACKAGE = "llama-cpp-python"
PINNED = abi.VERSION
COMMIT = "0c1e57098"  # the llama.cpp that the pinned version carries, by its change log

# ELF files name their symbols and compiler in plain text near the beginning or the end, never in between.
_ENDS = 16 << 20
_COMPILER = re.compile(rb"GCC: \([^)\0]*\) [0-9.]+|[A-Za-z ]*clang version [0-9.]+")
_CUDART = re.compile(rb"(?:libcudart\.so\.|cudart64_)(\d+)")
# What `assert` calls on Linux, macOS and Windows: with -DNDEBUG, as in a release build, nothing does.
_ASSERTS = (b"__assert_fail", b"__assert_rtn", b"_wassert")


@dataclass(frozen=True, slots=True)
class Build:
    """The library as it is installed. Empty text, None and empty tuples: it does not tell.

    `version` is llama-cpp-python's, `llama` and `ggml` are what the libraries call themselves, `commit` is ggml's.
    `backends` are the compiled-in ones by the names that users know (CUDA, ROCm, Metal, Vulkan, CPU); `cpu_features`
    are the instructions the CPU backend uses, in ggml's names. `assertions`: they are compiled in, as in debug builds;
    `cuda` is the major version of the CUDA runtime it is linked to. `error` says why the library cannot be used.
    """

    version: str = ""
    llama: str = ""
    ggml: str = ""
    commit: str = ""
    compiler: str = ""
    backends: tuple[str, ...] = ()
    cpu_features: frozenset[str] = frozenset()
    devices: tuple[Device, ...] = ()
    assertions: bool | None = None
    cuda: int | None = None
    error: str = ""


def build_info() -> Build:
    """What is installed here; never raises: a library that cannot be used is told in `error`."""
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return Build(error=f"{PACKAGE} is not installed")
    try:
        lib = library()
    except NativeMismatch as error:
        return Build(version=installed, error=str(error).removesuffix(f": {abi.MEND}."))
    compiler, assertions, cuda = read_libraries(lib.path.parent)
    names = [lib.ggml.ggml_backend_reg_name(lib.ggml.ggml_backend_reg_get(i)).decode() for i in range(_count(lib))]
    return Build(
        version=installed,
        llama=lib.llama.llama_version().decode(),
        ggml=lib.ggml.ggml_version().decode(),
        commit=lib.ggml.ggml_commit().decode(),
        compiler=compiler,
        backends=tuple("Metal" if name == "MTL" else name for name in names),
        cpu_features=cpu_features(),
        devices=devices(lib),
        assertions=assertions,
        cuda=cuda,
    )


def cpu_features() -> frozenset[str]:
    """The instructions that the CPU backend uses, in ggml's names. Raises NativeMismatch."""
    return features_of(library().llama.llama_print_system_info().decode()).get("CPU", frozenset())


def features_of(system_info: str) -> dict[str, frozenset[str]]:
    """The features that are on, by backend, from `llama_print_system_info` ("CPU : AVX2 = 1 | … | CUDA : …")."""
    found: dict[str, frozenset[str]] = {}
    backend = ""
    for cell in system_info.split("|"):
        head, colon, rest = cell.rpartition(" : ")
        backend = head.strip() if colon else backend
        name, _, value = (part.strip() for part in (rest if colon else cell).partition("="))
        if name and value != "0":
            found[backend] = found.get(backend, frozenset()) | {name}
    return found


def read_libraries(folder: Path) -> tuple[str, bool | None, int | None]:
    """The compiler, whether assertions are in, and the CUDA runtime's major version, from ggml's files in a folder."""
    compiler, assertions, cuda = "", None, None
    for path in sorted({path.resolve() for path in folder.glob("*ggml*") if path.is_file()}):
        text = _ends(path)
        if "ggml-base" in path.name:
            assertions = any(name in text for name in _ASSERTS)
            named = _COMPILER.findall(text)
            compiler = named[-1].decode().strip() if named else ""
        linked = _CUDART.search(text)
        # Windows writes cudart64_110 for CUDA 11 and cudart64_12 for CUDA 12.
        cuda = int(linked.group(1)[:2]) if linked else cuda
    return compiler, assertions, cuda


def _ends(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            first = file.read(_ENDS)
            rest = path.stat().st_size - len(first)
            file.seek(max(len(first), len(first) + rest - _ENDS))
            return first + file.read()
    except OSError:
        return b""


def _count(lib: Library) -> int:
    return int(lib.ggml.ggml_backend_reg_count())
