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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from opsin.bench.cost import Ceiling
from opsin.compose import main_device
from opsin.core.errors import OpsinError
from opsin.native.devices import Device, fastest
from opsin.native.library import library

TYPES = {"f32": (0, 4.0), "f16": (1, 2.0), "q4_0": (2, 18 / 32), "q8_0": (8, 34 / 32)}
"""ggml's number of a type, and its bytes a value."""
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
    ggml, f32 = library().ggml, TYPES["f32"][0]

    def product(kind: str, width: int, rows: int, columns: int) -> float:
        """Seconds of one."""
        return fastest(device, ggml, ggml.ggml_mul_mat, [(f32, width, columns), (TYPES[kind][0], width, rows)])

    def read(kind: str) -> float:
        rows = int(size / TYPES[kind][1] / sizes["width"])
        return rows * sizes["width"] * TYPES[kind][1] / product(kind, sizes["width"], rows, 1)

    def multiply(kind: str) -> float:
        shape = sizes["width"], sizes["rows"], sizes["columns"]
        return 2.0 * shape[0] * shape[1] * shape[2] / product(kind, *shape)

    return Rates(
        f"{device.name} ({device.description})",
        copy_bytes_s=2.0 * size / fastest(device, ggml, _copy, [(f32, size // 4096, 1024)] * 2),
        read_bytes_s={kind: read(kind) for kind in ("f16", "q4_0")},
        matrix_ops_s={kind: multiply(kind) for kind in ("f16", "q8_0", "q4_0")},
    )


def _copy(context: int, source: int, target: int) -> int:
    from llama_cpp import _ggml

    function = _ggml.libggml["ggml_cpy"]  # a new function object: nobody else's argtypes are changed
    function.argtypes, function.restype = [ctypes.c_void_p] * 3, ctypes.c_void_p
    return int(function(context, source, target))


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
