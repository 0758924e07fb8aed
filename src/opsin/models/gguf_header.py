"""The head of a GGUF file: its metadata and the list of its tensors, read without touching a weight.

The `gguf` package's own reader builds an array for every token of the vocabulary, and importing it alone takes a third
of a second; this one steps over arrays and needs a few milliseconds. Source of the format: llama.cpp's
`ggml/src/gguf.cpp`.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opsin.core.errors import ModelNotFound, ModelUnreadable

if TYPE_CHECKING:
    from pathlib import Path

Scalar = int | float | bool | str

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# ggml_type -> name, values of a block, bytes of a block. Here because importing `gguf` is slow; a test compares them.
# fmt: off
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}
# fmt: on

# How other kinds of file begin, and what to say of them.
_FOREIGN = (
    (b"PK\x03\x04", "is a zip or PyTorch file, not GGUF: convert the model with llama.cpp or pull a GGUF of it"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the model: fetch the file itself with `git lfs pull`"),
    (b"<!DOCTYPE", "is a web page, not a model: the download went wrong, fetch it again"),
    (b"<html", "is a web page, not a model: the download went wrong, fetch it again"),
    (b"lmgg", "is an old GGML file: get the model as GGUF"),
    (b"tjgg", "is an old GGML file: get the model as GGUF"),
    (b"fmgg", "is an old GGML file: get the model as GGUF"),
)


@dataclass(frozen=True, slots=True)
class TensorHead:
    """Name, shape (row length first) and type of a tensor; `end` is where its data ends, bytes from the file's start.

    Type and end are None for a type unknown here.
    """

    name: str
    shape: tuple[int, ...]
    type: str | None
    end: int | None


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata without its arrays (`lengths` has their lengths), and all tensors. `size` is the file's, in bytes."""

    path: Path
    size: int
    metadata: dict[str, Scalar]
    lengths: dict[str, int] = field(repr=False)
    tensors: tuple[TensorHead, ...] = field(repr=False)

    def integer(self, key: str) -> int | None:
        """A metadata value, when it is there and a whole number."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def text(self, key: str) -> str | None:
        """A metadata value, when it is there and a string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


def read_header(path: Path) -> GgufHeader:
    """Read and check the head of a file.

    Raises ModelNotFound when there is no such file, ModelUnreadable when it is no GGUF file or is cut short.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
            if start[:4] != b"GGUF":
                raise ModelUnreadable(f"{path} {_foreign(start)}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Cursor(path, view).header()
    except FileNotFoundError as error:
        raise ModelNotFound(
            f"there is no file {path}: check the path, or see what is here with `opsin models`"
        ) from error
    except IsADirectoryError as error:
        raise ModelUnreadable(f"{path} is a folder, not a GGUF file") from error
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error.strerror or error}") from error
    except struct.error as error:
        raise ModelUnreadable(f"{path} ends in the middle of its header: download it again") from error


def _foreign(start: bytes) -> str:
    if not start:
        return "is empty: download it again"
    for magic, text in _FOREIGN:
        if start.startswith(magic):
            return text
    if start[8:9] == b"{":
        return "is a safetensors file, not GGUF: convert the model with llama.cpp or pull a GGUF of it"
    return "is not a GGUF file"


class _Cursor:
    """Walks through one header; struct.error means that the file ends too early."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._at = 4

    def header(self) -> GgufHeader:
        version = self._number("I")
        if version not in {2, 3}:
            raise ModelUnreadable(
                f"{self._path} is big-endian GGUF, which this machine does not read"
                if version & 0xFFFF == 0
                else f"{self._path} is GGUF version {version}: only versions 2 and 3 are read"
            )
        tensor_count, key_count = self._number("Q"), self._number("Q")
        metadata: dict[str, Scalar] = {}
        lengths: dict[str, int] = {}
        # A count that lies costs nothing: each turn reads bytes, and the file's end stops it.
        for _ in range(key_count):
            key = self._string()
            kind = self._number("I")
            if kind == _ARRAY:
                lengths[key] = self._skip_array()
            else:
                metadata[key] = self._scalar(kind)
        raw = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._broken(f"a data alignment of {alignment!r}")
        data = -(-self._at // alignment) * alignment
        tensors = tuple(
            TensorHead(name, shape, kind, None if end is None else data + end) for name, shape, kind, end in raw
        )
        return GgufHeader(self._path, len(self._view), metadata, lengths, tensors)

    def _number(self, code: str) -> int:
        value: int = struct.unpack_from("<" + code, self._view, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._number("Q")
        return self._take(length).decode("utf-8", "replace")

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._view):
            raise struct.error
        piece = self._view[self._at : end]
        self._at = end
        return piece

    def _scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self._string()
        code = _SCALARS.get(kind)
        if code is None:
            raise self._broken(f"a value of the unknown kind {kind}")
        return self._number(code)

    def _skip_array(self) -> int:
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            view, at, read = self._view, self._at, struct.Struct("<Q").unpack_from
            for _ in range(count):
                at += 8 + read(view, at)[0]
            self._at = at
        elif kind in _SCALARS:
            self._at += count * struct.calcsize("<" + _SCALARS[kind])
        else:
            raise self._broken("an array of a kind llama.cpp does not read")
        if self._at > len(self._view):
            raise struct.error
        return count

    def _tensor(self) -> tuple[str, tuple[int, ...], str | None, int | None]:
        name = self._string()
        dimensions = self._number("I")
        if dimensions > 4:
            raise self._broken(f"the tensor {name[:64]!r} of {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        kind, offset = self._number("I"), self._number("Q")
        if kind not in TENSOR_TYPES:
            return name, shape, None, None
        type_name, values, size = TENSOR_TYPES[kind]
        count = 1
        for length in shape:
            count *= length
        return name, shape, type_name, offset + count // values * size

    def _broken(self, what: str) -> ModelUnreadable:
        return ModelUnreadable(f"{self._path} is a damaged GGUF file (it holds {what}): download it again")
