"""What this machine could do at best: memory read and copied, and matrices multiplied, by NumPy on all cores.

A decode step reads every weight once, so memory bounds it; prefill and encode multiply matrices. The matrix rate is
that of float32: llama.cpp multiplies quantised weights with narrower instructions, so it can exceed what is measured
here, and a share above 100 % is possible.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

ARRAY_BYTES = 256 * 2**20
"""Larger than any cache that a core has for itself."""

MATRIX_SIDE = 1536


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates in bytes and in floating-point operations a second; copying counts what is read and what is written."""

    threads: int
    read_bytes_s: float
    copy_bytes_s: float
    matrix_ops_s: float


def measure_machine(
    threads: int, *, array_bytes: int = ARRAY_BYTES, side: int = MATRIX_SIDE, repeats: int = 7
) -> Machine:
    """Take the best of `repeats` of each; memory by `threads` threads, matrices by however many NumPy uses."""
    source = np.ones(array_bytes // 8, np.float64)
    target = np.empty_like(source)
    matrix = np.full((side, side), 0.5, np.float32)
    product = np.empty_like(matrix)
    with ThreadPoolExecutor(threads) as pool:
        pieces = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
        read = _best(lambda: list(pool.map(lambda piece: piece[0].sum(), pieces)), repeats)
        copy = _best(lambda: list(pool.map(lambda piece: np.copyto(piece[1], piece[0]), pieces)), repeats)
    multiply = _best(lambda: np.matmul(matrix, matrix, out=product), repeats)
    return Machine(threads, source.nbytes / read, 2 * source.nbytes / copy, 2 * side**3 / multiply)


def _best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run; the first one, which touches the memory, is not counted."""
    work()
    times = []
    for _ in range(max(1, repeats)):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return max(min(times), 1e-9)
