"""What the installed llama.cpp says of itself: versions, backends, CPU instructions, devices, assertions."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from opsin.core.errors import NativeMismatch
from opsin.native import abi
from opsin.native.devices import Device, devices
from opsin.native.library import library

PACKAGE = "llama-cpp-python"
PINNED = abi.VERSION
COMMIT = "0c1e57098"  # the llama.cpp that the pinned version carries, by its change log

# What `assert` calls on Linux and macOS: with -DNDEBUG, as in a release build, nothing does.
_ASSERTS = (b"__assert_fail", b"__assert_rtn")


@dataclass(frozen=True, slots=True)
class Build:
    """The library as it is installed. `error` says why it cannot be used.

    `version` is llama-cpp-python's, `commit` is ggml's. `backends` are the compiled-in ones by the names that users
    know (CUDA, ROCm, Metal, Vulkan, CPU); `cpu_features` are the CPU backend's instructions in ggml's names.
    """

    version: str = ""
    llama: str = ""
    commit: str = ""
    backends: tuple[str, ...] = ()
    cpu_features: frozenset[str] = frozenset()
    devices: tuple[Device, ...] = ()
    assertions: bool = False
    error: str = ""

    @property
    def extra_backends(self) -> list[str]:
        """The backends that a new build must have too."""
        return [name for name in self.backends if name != "CPU"]


def build_info() -> Build:
    """What is installed here; never raises."""
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return Build(error=f"{PACKAGE} is not installed")
    try:
        lib = library()
    except NativeMismatch as error:
        return Build(version=installed, error=str(error).removesuffix(f": {abi.ADVICE}."))
    ggml = lib.ggml
    count = ggml.ggml_backend_reg_count()
    names = [ggml.ggml_backend_reg_name(ggml.ggml_backend_reg_get(index)).decode() for index in range(count)]
    return Build(
        version=installed,
        llama=lib.llama.llama_version().decode(),
        commit=ggml.ggml_commit().decode(),
        backends=tuple("Metal" if name == "MTL" else name for name in names),
        cpu_features=cpu_features(),
        devices=devices(lib),
        assertions=has_assertions(lib.path.parent),
    )


def cpu_features() -> frozenset[str]:
    """The instructions that the CPU backend uses, in ggml's names. Raises NativeMismatch."""
    return features_of(library().llama.llama_print_system_info().decode())


def features_of(system_info: str) -> frozenset[str]:
    """The CPU backend's features that are on, from llama.cpp's "CUDA : ARCHS = 860 | CPU : AVX2 = 1 | FMA = 0"."""
    cells = system_info.rpartition("CPU : ")[2].split("|")
    pairs = (cell.split("=") for cell in cells if "=" in cell)
    return frozenset(name.strip() for name, value in pairs if value.strip() != "0")


def has_assertions(folder: Path) -> bool:
    """Whether ggml's base library in a folder calls the C library's assert, as debug builds do."""
    files = [path for path in folder.glob("*ggml-base*") if path.is_file()]
    return any(name in path.read_bytes() for path in files[:1] for name in _ASSERTS)
