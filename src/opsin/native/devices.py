"""What the installed llama.cpp can compute on: its build, its devices, their free memory and rates, and CPU cores."""

import ctypes
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opsin.core.errors import BadParameter, ModelError, NativeMismatch
from opsin.core.model_info import HOST
from opsin.native.ggml import InitParams
from opsin.native.library import ADVICE, VERSION, Library, library

PACKAGE = "llama-cpp-python"
PINNED = VERSION
COMMIT = "0c1e57098"  # the llama.cpp that the pinned version carries, by its change log
CPU_NAMES = frozenset({"none", "cpu"})
_KINDS = {"metal": "mtl"}  # what people call devices, by what ggml does

_TYPES = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel", 4: "meta"}
# What `assert` calls on Linux and macOS: with -DNDEBUG, as in a release build, nothing does.
_ASSERTS = (b"__assert_fail", b"__assert_rtn")
# Below this, threads wait for each other longer than they compute: measured with the 4 M demo model on 2 cores, a
# decode step takes 0.25 ms with one thread and 0.36 with two, and 9 ms with two when other programs use the cores.
_SMALL_PARAMETERS = 20_000_000
_BESIDE_GPU = 4
_RESERVED = 384 * 2**20  # of addresses, by threads and libraries, most of them without memory behind

_F32, _F16 = 0, 1  # ggml_type
_MATRICES = 4
_SECONDS = 0.3  # of measuring for each product
# [width, rows, columns]; a GPU that finishes the first at once gets the second, 256 times the work.
_SIZES = ((1024, 1024, 128), (4096, 4096, 2048))
_VECTOR_WIDTH = 8192
_VECTOR_BYTES = 256 * 2**20  # larger than the caches of what is in use
_LARGER = 8  # times that, for a GPU that reads it at once
_FILL = 0x11  # bytes of a small normal number in f16 and f32: denormal numbers are slow on some CPUs


@dataclass(frozen=True, slots=True)
class Device:
    """A ggml device: `type` is cpu, gpu, igpu, accel or meta; memory in bytes (0 where ggml cannot tell)."""

    name: str
    description: str
    type: str
    memory_free: int
    memory_total: int
    handle: int

    @property
    def is_gpu(self) -> bool:
        """Whether layers can be offloaded to it."""
        return self.type in {"gpu", "igpu"}


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


@dataclass(frozen=True, slots=True)
class DeviceRate:
    """Floating-point operations (f16 weights, f32 values) and bytes read, a second."""

    ops_s: float
    bytes_s: float


def build_info() -> Build:
    """What is installed here; never raises."""
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return Build(error=f"{PACKAGE} is not installed")
    try:
        lib = library()
    except NativeMismatch as error:
        return Build(version=installed, error=str(error).removesuffix(f": {ADVICE}."))
    ggml = lib.ggml
    count = ggml.ggml_backend_reg_count()
    names = [ggml.ggml_backend_reg_name(ggml.ggml_backend_reg_get(index)).decode() for index in range(count)]
    return Build(
        version=installed,
        llama=lib.llama.llama_version().decode(),
        commit=ggml.ggml_commit().decode(),
        backends=tuple("Metal" if name == "MTL" else name for name in names),
        cpu_features=cpu_features(),
        devices=devices(),
        assertions=has_assertions(lib.path.parent),
    )


def cpu_features() -> frozenset[str]:
    """The instructions that the CPU backend uses, in ggml's names. Raises NativeMismatch."""
    return features_of(library().llama.llama_print_system_info().decode())


def features_of(system_info: str) -> frozenset[str]:
    """The CPU backend's features that are on, from llama.cpp's "CUDA : ARCHS = 860 | CPU : AVX2 = 1 | FMA = 0"."""
    pairs = re.findall(r"(\w+) = (\S+)", system_info.rpartition("CPU : ")[2])
    return frozenset(name for name, value in pairs if value != "0")


def has_assertions(folder: Path) -> bool:
    """Whether ggml's base library in a folder calls the C library's assert, as debug builds do."""
    files = [path for path in folder.glob("*ggml-base*") if path.is_file()]
    return any(name in path.read_bytes() for path in files[:1] for name in _ASSERTS)


def devices() -> tuple[Device, ...]:
    """All devices, in ggml's order. Raises NativeMismatch."""
    ggml = library().ggml

    def device(handle: int) -> Device:
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        name, described = ggml.ggml_backend_dev_name(handle), ggml.ggml_backend_dev_description(handle)
        kind = _TYPES.get(ggml.ggml_backend_dev_type(handle), "unknown")
        return Device(name.decode(), described.decode(), kind, free.value, total.value, handle)

    return tuple(device(ggml.ggml_backend_dev_get(index)) for index in range(ggml.ggml_backend_dev_count()))


def cards(present: Sequence[Device]) -> list[Device]:
    """The GPUs that llama.cpp takes by itself: those that share the CPU's memory only where there is no other.

    A second backend's are left out, since they are the same cards.
    """
    found = [one for one in present if one.type == "gpu"] or [one for one in present if one.is_gpu]
    kinds = [one.name.rstrip("0123456789") for one in found]
    return [one for one, kind in zip(found, kinds, strict=True) if kind == kinds[0]]


def pick(name: str | None, option: str, present: Sequence[Device]) -> list[Device]:
    """All `cards` without a name, none for "none" and "cpu", else the device of that name, or the GPUs of that kind.

    Raises BadParameter, which lists what is here.
    """
    gpus = [device for device in present if device.is_gpu]
    if name is None:
        return cards(gpus)
    wanted = name.strip().lower()
    if wanted in CPU_NAMES:
        return []
    found = [device for device in present if device.name.lower() == wanted]
    kind = _KINDS.get(wanted, wanted)
    found = found or cards([gpu for gpu in gpus if gpu.name.lower().rstrip("0123456789") == kind])
    if found:
        return found
    here = ", ".join(gpu.name for gpu in gpus)
    advice = f"this build sees {here}, or give none for the CPU" if here else "this build of llama.cpp sees no GPU"
    raise BadParameter(f"There is no device {name!r} for {option}: {advice}.")


def free_memory(present: Iterable[Device], root: Path = Path("/")) -> dict[str, int]:
    """Free bytes by device name; devices that cannot tell are left out. `root` is where /proc and /sys lie.

    The host's are what Linux calls available, within limits of this process and its control groups; elsewhere ggml's.
    """
    present = tuple(present)
    found = {one.name: one.memory_free for one in present if one.is_gpu and one.memory_total > 0}
    meminfo = re.search(r"^MemAvailable:\s+(\d+)", read_system_file(root / "proc/meminfo"), re.MULTILINE)
    told = [one.memory_free for one in present if one.type == "cpu" and one.memory_total > 0]
    host = [int(meminfo[1]) * 1024] if meminfo else told[:1]
    if host:
        groups = (left for group in control_groups(root) for left in _left_in_group(group))
        found[HOST] = min([*host, *groups, *_left_of_addresses(root / "proc/self")])
    return found


def _left_of_addresses(process: Path) -> list[int]:
    """What this process may still map, where it has such a limit (`ulimit -v`), without what threads reserve."""
    limit = re.search(r"^Max address space +(\d+)", read_system_file(process / "limits"), re.MULTILINE)
    used = re.search(r"^VmSize:\s+(\d+)", read_system_file(process / "status"), re.MULTILINE)
    return [max(0, int(limit[1]) - int(used[1]) * 1024 - _RESERVED)] if limit and used else []


def _left_in_group(group: Path) -> list[int]:
    """What a control group has left; files it can drop are counted as free."""
    limit, used = (read_system_file(group / f"memory.{name}").strip() for name in ("max", "current"))
    if not (limit.isdigit() and used.isdigit()):
        return []
    droppable = re.search(r"^inactive_file (\d+)", read_system_file(group / "memory.stat"), re.MULTILINE)
    return [max(0, int(limit) - int(used) + (int(droppable[1]) if droppable else 0))]


def read_system_file(path: Path) -> str:
    """The text of a file; empty where it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def control_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control group (version 2) and of those above it; `root` has /proc and /sys."""
    found = re.search(r"^0::(.*)", read_system_file(root / "proc/self/cgroup"), re.MULTILINE)
    mount = root / "sys/fs/cgroup"
    if found:
        # In a container the path may be the host's: what counts then lies at the mount itself.
        folder = mount / found[1].strip("/")
        yield from (level for level in (folder, *folder.parents) if level.is_relative_to(mount))


def default_threads(parameters: int, *, offloaded: bool = False) -> int:
    """Threads for a model of that many parameters: one for a small one, else one for each physical core.

    Of one that is `offloaded` whole the CPU only looks up tokens, and more threads than a few spin beside the GPU.
    """
    few = _BESIDE_GPU if offloaded else sys.maxsize
    return 1 if parameters < _SMALL_PARAMETERS else min(few, physical_cores())


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores, counted by sibling sets on Linux and asked of the kernel on macOS; else the logical count."""
    if sys.platform == "darwin":
        # Performance cores, where there are such: work split evenly over fast and slow cores waits for the slow ones.
        command = ("/usr/sbin/sysctl", "-n", "hw.perflevel0.physicalcpu", "hw.physicalcpu")
        counts = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()  # noqa: S603
        return int(counts[0]) if counts else os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):  # Windows
        return os.cpu_count() or 1
    usable = os.sched_getaffinity(0)
    siblings = [read_system_file(topology / f"cpu{cpu}/topology/thread_siblings_list") for cpu in usable]
    return len(set(siblings)) if all(siblings) else len(usable)


def measure_device(device: Device, lib: Library | None = None) -> DeviceRate:
    """Measure one device for about a second, with at most 300 MiB, on a quick GPU 2 GiB, or a quarter of what is free.

    Raises ModelError when it has no room or fails.
    """
    ggml = (lib or library()).ggml
    size = min(_VECTOR_BYTES, device.memory_free // 4 or _VECTOR_BYTES)
    vector = (_VECTOR_WIDTH, max(32, size // (2 * _VECTOR_WIDTH * _MATRICES)), 1)

    def product(width: int, rows: int, columns: int) -> float:
        """Seconds of one product of f16 [width, rows] with f32 [width, columns], several at once."""
        shapes = [(_F32, width, columns), *[(_F16, width, rows)] * _MATRICES]
        return fastest(device, ggml, ggml.ggml_mul_mat, shapes) / _MATRICES

    sizes, seconds = _SIZES[0], product(*_SIZES[0])
    # The second size takes more memory than the vectors, and is left out where even those had to shrink.
    if device.is_gpu and seconds < 0.0003 and size == _VECTOR_BYTES:
        sizes, seconds = _SIZES[1], product(*_SIZES[1])
    ops_s = 2.0 * math.prod(sizes) / seconds
    seconds = product(*vector)
    # A start of a few microseconds would count.
    if device.is_gpu and seconds < 0.0001 and device.memory_free // 4 > _LARGER * _VECTOR_BYTES:
        vector = (vector[0], _LARGER * vector[1], 1)
        seconds = product(*vector)
    return DeviceRate(ops_s, 2.0 * math.prod(vector) / seconds)


def fastest(
    device: Device, ggml: Any, op: Callable[[int, int, int], int], shapes: Sequence[tuple[int, int, int]]
) -> float:
    """Seconds of the best run of a graph with `op(context, other, first)` for each other tensor, with all cores.

    A tensor is its ggml type, its width, and its rows. Raises ModelError.
    """
    with ExitStack() as stack:
        backend = _made(device, ggml.ggml_backend_dev_init(device.handle, None), "it cannot be opened")
        stack.callback(ggml.ggml_backend_free, backend)
        if device.type == "cpu":
            registry = ggml.ggml_backend_dev_backend_reg(device.handle)
            address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
            _made(device, address, "its threads cannot be set")
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, physical_cores())
        memory = ggml.ggml_graph_overhead() + 2 * len(shapes) * ggml.ggml_tensor_overhead()
        context = ggml.ggml_init(InitParams(memory, None, True))
        stack.callback(ggml.ggml_free, context)
        graph = ggml.ggml_new_graph(context)
        first, *others = (ggml.ggml_new_tensor_4d(context, *shape, 1, 1) for shape in shapes)
        for other in others:
            ggml.ggml_build_forward_expand(graph, op(context, other, first))
        buffer = _made(device, ggml.ggml_backend_alloc_ctx_tensors(context, backend), "it has no room")
        stack.callback(ggml.ggml_backend_buffer_free, buffer)
        ggml.ggml_backend_buffer_clear(buffer, _FILL)
        runs: list[float] = []
        until = time.perf_counter() + _SECONDS
        while len(runs) < 2 or time.perf_counter() < until:
            started = time.perf_counter()
            failed = ggml.ggml_backend_graph_compute(backend, graph)
            ggml.ggml_backend_synchronize(backend)
            _made(device, not failed, "its computing failed")
            runs.append(time.perf_counter() - started)
        return min(runs[1:])  # the first compiles kernels and starts threads


def _made(device: Device, made: int, why: str) -> int:
    if not made:
        raise ModelError(f"The rate of {device.name} cannot be measured, since {why}: close other programs that use it")
    return made
