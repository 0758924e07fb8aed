"""What a device really reaches through ggml: operations a second of a large product, bytes a second read.

The stages of a pair are compared with this ceiling. Published peaks are no use for that: drivers, power limits, memory
in the wrong slots and the kernels of this build lie between them and what can be had.
"""

from __future__ import annotations

import ctypes
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opsin.core.errors import ModelError
from opsin.native.ggml import InitParams
from opsin.native.library import Library, library
from opsin.native.threads import physical_cores

if TYPE_CHECKING:
    from opsin.native.devices import Device

_F32, _F16 = 0, 1
_MATRICES = 4
_SECONDS = 0.3  # of measuring for each of the two
# [width, rows, columns]. The first takes a few milliseconds on a CPU: of many short runs, some are not interrupted by
# other programs. A GPU that finishes it at once gets the second, 256 times the work; a slow or emulated one would need
# seconds for that.
_SIZES = ((1024, 1024, 128), (4096, 4096, 2048))
_AT_ONCE = 0.0003
_VECTOR_WIDTH = 8192
_VECTOR_BYTES = 256 * 2**20  # larger than the caches of what is in use
_SHARE_OF_FREE = 0.25
# Bytes of 0x11 are small normal numbers in f16 and f32, and so are their products: denormal numbers are slow on some
# CPUs, and pages that were never written are all the same page.
_FILL = 0x11


@dataclass(frozen=True, slots=True)
class DeviceRate:
    """What was measured.

    `ops_s` are floating-point operations a second of a large product (f16 weights, f32 values), `bytes_s` bytes a
    second read by products of matrices and a vector.
    """

    ops_s: float
    bytes_s: float


def measure_device(device: Device, threads: int | None = None, lib: Library | None = None) -> DeviceRate:
    """Measure one device for about a second, with memory of at most 300 MiB or a quarter of what is free there.

    `threads` are those of the CPU device (default: one per physical core); other devices have none. Raises ModelError
    when the device cannot be opened, has no room or fails.
    """
    lib = lib or library()
    size = _VECTOR_BYTES
    if device.memory_free:
        size = min(size, int(device.memory_free * _SHARE_OF_FREE))
    rows = max(32, size // (2 * _VECTOR_WIDTH * _MATRICES))
    with ExitStack() as stack:
        backend = lib.ggml.ggml_backend_dev_init(device.handle, None)
        if not backend:
            raise _failed(device, "it cannot be opened")
        stack.callback(lib.ggml.ggml_backend_free, backend)
        # Threads spin while they wait for each other: where other programs use the cores, one is faster than all.
        counts = sorted({threads or physical_cores(), 1}) if device.type == "cpu" else [0]
        ops_s = 0.0
        # The second size takes more memory than the vectors, and is left out where even those had to shrink.
        for sizes in _SIZES if device.is_gpu and size == _VECTOR_BYTES else _SIZES[:1]:
            seconds = _fastest(lib, device, backend, sizes, counts)
            ops_s = max(ops_s, 2.0 * math.prod(sizes) / seconds)
            if seconds > _AT_ONCE:
                break
        seconds = _fastest(lib, device, backend, (_VECTOR_WIDTH, rows, 1), counts)
        return DeviceRate(ops_s=ops_s, bytes_s=2.0 * _VECTOR_WIDTH * rows / seconds)


def _fastest(lib: Library, device: Device, backend: int, sizes: tuple[int, int, int], counts: list[int]) -> float:
    """Seconds of one product of f16 [width, rows] with f32 [width, columns].

    The best of as many as fit into the time, over four matrices in turn, for each number of threads in `counts`.
    """
    ggml: Any = lib.ggml
    width, rows, columns = sizes
    # A GPU gets all products in one graph, since a launch takes as long as a short product.
    count = 1 if device.is_gpu else _MATRICES
    with ExitStack() as stack:
        memory = count * ggml.ggml_graph_overhead() + 4 * _MATRICES * ggml.ggml_tensor_overhead()
        context = ggml.ggml_init(InitParams(memory, None, True))
        stack.callback(ggml.ggml_free, context)
        right = ggml.ggml_new_tensor_4d(context, _F32, width, columns, 1, 1)
        graphs = [ggml.ggml_new_graph(context) for _ in range(count)]
        for index in range(_MATRICES):
            left = ggml.ggml_new_tensor_4d(context, _F16, width, rows, 1, 1)
            ggml.ggml_build_forward_expand(graphs[index % count], ggml.ggml_mul_mat(context, left, right))
        buffer = ggml.ggml_backend_alloc_ctx_tensors(context, backend)
        if not buffer:
            raise _failed(device, "it has no room")
        stack.callback(ggml.ggml_backend_buffer_free, buffer)
        ggml.ggml_backend_buffer_clear(buffer, _FILL)
        best = float("inf")
        for threads in counts:
            if threads:
                _set_threads(lib, device, backend, threads)
            until, run = time.perf_counter() + _SECONDS / len(counts), 0
            # The first runs warm up: they compile kernels and start threads. At least one more is measured.
            while run <= count or time.perf_counter() < until:
                started = time.perf_counter()
                if ggml.ggml_backend_graph_compute(backend, graphs[run % count]) != 0:
                    raise _failed(device, "its computing failed")
                ggml.ggml_backend_synchronize(backend)
                if run >= count:
                    best = min(best, time.perf_counter() - started)
                run += 1
        return best * count / _MATRICES


def _set_threads(lib: Library, device: Device, backend: int, threads: int) -> None:
    registry = lib.ggml.ggml_backend_dev_backend_reg(device.handle)
    address = lib.ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
    if not address:
        raise _failed(device, "its threads cannot be set")
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, threads)


def _failed(device: Device, why: str) -> ModelError:
    return ModelError(f"The rate of {device.name} cannot be measured, since {why}: close other programs that use it.")
