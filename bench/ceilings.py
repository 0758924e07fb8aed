#!/usr/bin/env python3
"""What a device does at best, with ggml's own kernels: bytes copied and read, and operations of a large product.

    python bench/ceilings.py --json-out ceilings.json

The device is the one that models go to: a GPU where there is one. Tensors are larger than caches, so that a GPU takes
much longer for a product than its start takes. Needs the package `opsin`; this checkout's is used where it is not
installed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from opsin.bench.cost import Ceiling
from opsin.compose import main_device
from opsin.core.errors import ModelError, OpsinError
from opsin.native.devices import Device, physical_cores
from opsin.native.ggml import InitParams
from opsin.native.library import library

TYPES = {"f32": (0, 4.0), "f16": (1, 2.0), "q4_0": (2, 18 / 32), "q8_0": (8, 34 / 32)}
"""ggml's number of a type, and its bytes a value."""
SECONDS = 0.3  # of measuring for each figure
FILL = 0x11  # bytes of small normal numbers in f16 and f32, also as the scale of a block
GPU = {"bytes": 2**30, "width": 8192, "rows": 8192, "columns": 4096}
CPU = {"bytes": 2**26, "width": 1024, "rows": 1024, "columns": 128}
"""`bytes` of the tensor that is copied or read once; width, rows and columns of the large product."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes and operations a second. A copy counts what is read and what is written."""

    device: str
    copy_bytes_s: float
    read_bytes_s: dict[str, float]
    matrix_ops_s: dict[str, float]

    @property
    def ceiling(self) -> Ceiling:
        """The best of each: what shares are of."""
        return Ceiling(
            self.device, max(self.copy_bytes_s, *self.read_bytes_s.values()), max(self.matrix_ops_s.values())
        )

    def document(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "device": self.device,
            "copy_gb_s": round(self.copy_bytes_s / 1e9, 1),
            "read_gb_s": {kind: round(rate / 1e9, 1) for kind, rate in self.read_bytes_s.items()},
            "matrix_tflop_s": {kind: round(rate / 1e12, 4) for kind, rate in self.matrix_ops_s.items()},
        }

    def text(self) -> str:
        """The same in one line."""
        reads = ", ".join(f"{kind} {rate / 1e9:,.0f}" for kind, rate in self.read_bytes_s.items())
        products = ", ".join(f"{kind} {rate / 1e12:,.2f}" for kind, rate in self.matrix_ops_s.items())
        return f"{self.device}: copies {self.copy_bytes_s / 1e9:,.0f} GB/s, reads {reads} GB/s, {products} TFLOP/s"


def measure_rates(device: Device | None = None) -> Rates:
    """Measure for about two seconds, with at most 3 GiB of a GPU. Raises ModelError."""
    device = device or main_device()
    sizes = GPU if device.is_gpu else CPU
    room = device.memory_free // 4 or sizes["bytes"]
    size = min(sizes["bytes"], room)
    with ExitStack() as stack:
        backend = _backend(device, stack)

        def copy(ggml: Any, context: int) -> int:
            return int(_copy(context, *(_tensor(ggml, context, "f32", size // 4096, 1024) for _ in range(2))))

        def product(kind: str, width: int, rows: int, columns: int) -> Callable[[Any, int], int]:
            def build(ggml: Any, context: int) -> int:
                left = _tensor(ggml, context, kind, width, rows)
                return int(ggml.ggml_mul_mat(context, left, _tensor(ggml, context, "f32", width, columns)))

            return build

        def read(kind: str) -> float:
            rows = int(size / TYPES[kind][1] / sizes["width"])
            return rows * sizes["width"] * TYPES[kind][1] / _fastest(backend, product(kind, sizes["width"], rows, 1))

        def multiply(kind: str) -> float:
            shape = sizes["width"], sizes["rows"], sizes["columns"]
            return 2.0 * shape[0] * shape[1] * shape[2] / _fastest(backend, product(kind, *shape))

        return Rates(
            f"{device.name} ({device.description})",
            copy_bytes_s=2.0 * size / _fastest(backend, copy),
            read_bytes_s={kind: read(kind) for kind in ("f16", "q4_0")},
            matrix_ops_s={kind: multiply(kind) for kind in ("f16", "q8_0", "q4_0")},
        )


def _backend(device: Device, stack: ExitStack) -> int:
    ggml = library().ggml
    backend = int(ggml.ggml_backend_dev_init(device.handle, None) or 0)
    if not backend:
        raise ModelError(f"{device.name} cannot be opened: close other programs that use it.")
    stack.callback(ggml.ggml_backend_free, backend)
    if device.type == "cpu":
        registry = ggml.ggml_backend_dev_backend_reg(device.handle)
        address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, physical_cores())
    return backend


def _tensor(ggml: Any, context: int, kind: str, width: int, rows: int) -> int:
    return int(ggml.ggml_new_tensor_4d(context, TYPES[kind][0], width, rows, 1, 1))


def _copy(context: int, source: int, target: int) -> int:
    from llama_cpp import _ggml

    function = _ggml.libggml["ggml_cpy"]  # a new function object: nobody else's argtypes are changed
    function.argtypes, function.restype = [ctypes.c_void_p] * 3, ctypes.c_void_p
    return int(function(context, source, target))


def _fastest(backend: int, build: Callable[[Any, int], int]) -> float:
    """Seconds of the fastest run of a graph of one operation, of those in 0.3 s behind the first, which warms up."""
    ggml = library().ggml
    with ExitStack() as stack:
        memory = ggml.ggml_graph_overhead() + 8 * ggml.ggml_tensor_overhead()
        context = ggml.ggml_init(InitParams(memory, None, True))
        stack.callback(ggml.ggml_free, context)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, build(ggml, context))
        buffer = ggml.ggml_backend_alloc_ctx_tensors(context, backend)
        if not buffer:
            raise ModelError("There is no room to measure the device: close other programs that use it.")
        stack.callback(ggml.ggml_backend_buffer_free, buffer)
        ggml.ggml_backend_buffer_clear(buffer, FILL)
        ggml.ggml_backend_synchronize(backend)
        runs: list[float] = []
        until = time.perf_counter() + SECONDS
        while len(runs) < 3 or time.perf_counter() < until:
            began = time.perf_counter()
            if ggml.ggml_backend_graph_compute(backend, graph):
                raise ModelError("The device failed to compute.")
            ggml.ggml_backend_synchronize(backend)
            runs.append(time.perf_counter() - began)
        return min(runs[1:])


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the document to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json-out", type=Path, help="also write the JSON document to this file")
    given = parser.parse_args(arguments)
    rates = measure_rates()
    if given.json_out is not None:
        given.json_out.write_text(json.dumps(rates.document(), indent=2) + "\n", encoding="utf-8")
    print(rates.text())


if __name__ == "__main__":
    try:
        main()
    except OpsinError as error:
        sys.exit(f"ceilings: {error}")
