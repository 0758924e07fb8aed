"""Random weights in bounded memory, at the speed of the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from synth.shapes import WeightType

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

_BLOCK = 32  # values of one block of q8_0 and q4_0; the other types are counted alike
BLOCK_BYTES: dict[WeightType, int] = {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q4_0": 18}

# llama.cpp's `llama_ftype`
FILE_TYPES: dict[WeightType, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}

# Number of random blocks. A prime larger than the number of rows of a tensor: rows then start at different blocks of
# the ring, so no two tokens get the same logit.
_RINGS = (8_191, 131_071, 524_287)


def fits(kind: WeightType, row: int) -> WeightType:
    """`kind`, or f16 if rows of `row` values are not a whole number of quantised blocks, as llama.cpp's tools do."""
    return "f16" if kind in {"q8_0", "q4_0"} and row % _BLOCK else kind


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: `shape` as ggml counts it (the row's length first), `spread` the standard deviation.

    A spread of 0 fills with `mean`.
    """

    name: str
    shape: tuple[int, ...]
    type: WeightType
    spread: float
    mean: float = 0.0

    @property
    def values(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in a file, without padding."""
        return self.values * BLOCK_BYTES[self.type] // _BLOCK


def linear(
    kind: WeightType, name: str, inputs: int, outputs: int, gain: float = 1.0, *, bias: bool = False
) -> Iterator[Tensor]:
    """A matrix that keeps the spread of what it is multiplied with, times `gain`."""
    yield Tensor(f"{name}.weight", (inputs, outputs), fits(kind, inputs), gain * inputs**-0.5)
    if bias:
        yield Tensor(f"{name}.bias", (outputs,), "f32", 0.02)


def norm(name: str, size: int, mean: float = 1.0, *, bias: bool = False) -> Iterator[Tensor]:
    """The factors of a normalisation, all `mean`."""
    yield Tensor(f"{name}.weight", (size,), "f32", 0.0, mean=mean)
    if bias:
        yield Tensor(f"{name}.bias", (size,), "f32", 0.0)


class RandomWeights:
    """Writes tensors of normally distributed values; `seed` decides every byte.

    One ring of random blocks is quantised once for each type and spread. Each tensor is written from the ring, starting
    at a random block, so 7 B parameters take only the time to write them.
    """

    def __init__(self, seed: int, tensors: list[Tensor]) -> None:
        import numpy as np

        rows = max(tensor.values // tensor.shape[0] for tensor in tensors)
        self._ring = next((size for size in _RINGS if size > rows), _RINGS[-1])
        self._rng = np.random.default_rng(seed)
        self._unit: NDArray[np.float32] = self._rng.standard_normal((self._ring, _BLOCK), dtype=np.float32)
        self._packed: dict[tuple[WeightType, float], memoryview] = {}

    def write(self, tensor: Tensor, out: IO[bytes]) -> None:
        """Append the tensor's bytes, little-endian and without padding."""
        if tensor.spread == 0:
            self._write_constant(tensor, out)
            return
        ring = self._packed_ring(tensor.type, tensor.spread)
        start = int(self._rng.integers(self._ring)) * BLOCK_BYTES[tensor.type]
        left = tensor.bytes
        while left:
            piece = ring[start : start + left]
            out.write(piece)
            left -= len(piece)
            start = 0

    def _write_constant(self, tensor: Tensor, out: IO[bytes]) -> None:
        import numpy as np

        if tensor.type != "f32":
            raise ValueError(f"{tensor.name}: only f32 tensors are filled with one value")
        out.write(np.full(tensor.values, tensor.mean, dtype="<f4").tobytes())

    def _packed_ring(self, kind: WeightType, spread: float) -> memoryview:
        key = (kind, spread)
        if key not in self._packed:
            import numpy as np
            from gguf import GGMLQuantizationType
            from gguf.quants import quantize

            # As one row: gguf quantises 16 rows at a time, whatever their length.
            packed = quantize(self._unit.reshape(1, -1) * np.float32(spread), GGMLQuantizationType[kind.upper()])
            self._packed[key] = np.ascontiguousarray(packed).view(np.uint8).reshape(-1).data
        return self._packed[key]
