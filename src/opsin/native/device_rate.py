"""What a device really reaches through ggml: operations a second of a large product, bytes a second read."""

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

_F32, _F16 = 0, 1  # ggml_type
_MATRICES = 4
_SECONDS = 0.3  # of measuring for each product
# [width, rows, columns]; a GPU that finishes the first at once gets the second, 256 times the work.
_SIZES = ((1024, 1024, 128), (4096, 4096, 2048))
_VECTOR_WIDTH = 8192
_VECTOR_BYTES = 256 * 2**20  # larger than the caches of what is in use
_FILL = 0x11  # bytes of a small normal number in f16 and f32: denormal numbers are slow on some CPUs


@dataclass(frozen=True, slots=True)
class DeviceRate:
    """Floating-point operations (f16 weights, f32 values) and bytes read, a second."""

    ops_s: float
    bytes_s: float


def measure_device(device: Device, threads: int | None = None, lib: Library | None = None) -> DeviceRate:
    """Measure one device for about a second, with at most 300 MiB or a quarter of what is free there.

    `threads` are those of a CPU (default: one per physical core). Raises ModelError when it has no room or fails.
    """
    ggml: Any = (lib or library()).ggml
    size = min(_VECTOR_BYTES, device.memory_free // 4 or _VECTOR_BYTES)
    vector = (_VECTOR_WIDTH, max(32, size // (2 * _VECTOR_WIDTH * _MATRICES)), 1)
    with ExitStack() as stack:
        backend = _made(device, ggml.ggml_backend_dev_init(device.handle, None), "it cannot be opened")
        stack.callback(ggml.ggml_backend_free, backend)
        if device.type == "cpu":
            registry = ggml.ggml_backend_dev_backend_reg(device.handle)
            address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
            _made(device, address, "its threads cannot be set")
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, threads or physical_cores())
        product, seconds = _SIZES[0], _fastest(ggml, device, backend, _SIZES[0])
        # The second size takes more memory than the vectors, and is left out where even those had to shrink.
        if device.is_gpu and seconds < 0.0003 and size == _VECTOR_BYTES:
            product, seconds = _SIZES[1], _fastest(ggml, device, backend, _SIZES[1])
        ops_s = 2.0 * math.prod(product) / seconds
        return DeviceRate(ops_s, 2.0 * math.prod(vector) / _fastest(ggml, device, backend, vector))


def _fastest(ggml: Any, device: Device, backend: int, sizes: tuple[int, int, int]) -> float:
    """Seconds of one product of f16 [width, rows] with f32 [width, columns]: the best of all that fit into the time."""
    width, rows, columns = sizes
    # A GPU gets all products in one graph, since a launch takes as long as a short product.
    count = 1 if device.is_gpu else _MATRICES
    with ExitStack() as stack:
        memory = count * ggml.ggml_graph_overhead() + 4 * _MATRICES * ggml.ggml_tensor_overhead()
        context = ggml.ggml_init(InitParams(memory, None, True))
        stack.callback(ggml.ggml_free, context)
        right = ggml.ggml_new_tensor_4d(context, _F32, width, columns, 1, 1)
        graphs = [ggml.ggml_new_graph(context) for _ in range(count)]
        for graph in graphs * (_MATRICES // count):
            left = ggml.ggml_new_tensor_4d(context, _F16, width, rows, 1, 1)
            ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(context, left, right))
        buffer = _made(device, ggml.ggml_backend_alloc_ctx_tensors(context, backend), "it has no room")
        stack.callback(ggml.ggml_backend_buffer_free, buffer)
        ggml.ggml_backend_buffer_clear(buffer, _FILL)
        best, until, run = float("inf"), time.perf_counter() + _SECONDS, 0
        # The first runs warm up: they compile kernels and start threads. At least one more is measured.
        while run <= count or time.perf_counter() < until:
            started = time.perf_counter()
            failed = ggml.ggml_backend_graph_compute(backend, graphs[run % count])
            ggml.ggml_backend_synchronize(backend)
            _made(device, not failed, "its computing failed")
            if run >= count:
                best = min(best, time.perf_counter() - started)
            run += 1
        return best * count / _MATRICES


def _made(device: Device, made: int, why: str) -> int:
    if not made:
        raise ModelError(f"The rate of {device.name} cannot be measured, since {why}: close other programs that use it")
    return made
