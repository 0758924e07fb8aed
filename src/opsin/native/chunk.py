"""One chunk of mtmd's output, alive as long as its layout, and what it says of itself."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsin.core.errors import EncodeFailed, NativeMismatch
from opsin.native.abi import MEND
from opsin.native.handles import Owned

if TYPE_CHECKING:
    from opsin.native.library import Library

_SERIAL_VERSION = 2  # MTMD_SERIALIZATION_VERSION


@dataclass(frozen=True, slots=True)
class ChunkMeta:
    """What mtmd saves of an image chunk besides its pixels.

    `entries` are the preprocessed pictures in it, each (view separator, newline, leading padding, width, height).
    `order` are the fields that place it in the prompt: some families encode the same picture differently by them.
    """

    n_x: int
    n_y: int
    order: tuple[int, int, int]
    entries: tuple[tuple[bool, bool, int, int, int], ...]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each preprocessed picture."""
        return tuple((entry[3], entry[4]) for entry in self.entries)


@dataclass(frozen=True, slots=True)
class ChunkHandle:
    """An image chunk of a layout that may have been closed meanwhile."""

    owner: Owned
    address: int
    meta: ChunkMeta

    @property
    def pointer(self) -> int:
        """The native chunk. Raises EncodeFailed after its layout was closed."""
        if self.owner.closed:
            raise EncodeFailed("The layout of this picture was closed before it was encoded.")
        return self.address


def read_meta(lib: Library, chunk: int) -> ChunkMeta:
    """The metadata of an image chunk. Raises NativeMismatch when mtmd saves it in another format."""
    size = ctypes.c_size_t(0)
    lib.mtmd.mtmd_input_chunk_save(chunk, None, 0, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    if lib.mtmd.mtmd_input_chunk_save(chunk, buffer, size.value, ctypes.byref(size)) != 0:
        raise NativeMismatch(f"mtmd cannot describe a picture's chunk: {MEND}.")
    try:
        return parse_meta(buffer.raw)
    except (struct.error, ValueError) as error:
        raise NativeMismatch(f"mtmd describes a picture's chunk in a format Opsin does not know: {MEND}.") from error


def parse_meta(data: bytes) -> ChunkMeta:
    """Read `mtmd_input_chunk_save`'s format, version 2. Raises ValueError or struct.error."""
    at = 0

    def take(layout: str) -> tuple[int, ...]:
        nonlocal at
        values = struct.unpack_from("<" + layout, data, at)
        at += struct.calcsize("<" + layout)
        return values

    version, _kind, n_text = take("QIQ")
    if version != _SERIAL_VERSION:
        raise ValueError(f"version {version}")
    at += 4 * n_text
    if take("?") != (True,):
        raise ValueError("no image")
    n_x, n_y, position, index, merge, id_bytes = take("IIIIIQ")
    at += id_bytes
    _audio, count = take("?Q")
    entries = tuple(take("??iii") for _ in range(count))
    if at >= len(data):
        raise ValueError("too short")
    return ChunkMeta(n_x, n_y, (position, index, merge), entries)  # type: ignore[arg-type]
