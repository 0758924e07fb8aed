"""A checked image: upright, opaque RGB pixels and the content identity made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from mmap import mmap


@dataclass(frozen=True, slots=True)
class Image:
    """One decoded image: upright, on white, 8 bit RGB.

    `rgb` holds `height * width * 3` bytes, row by row, maybe in memory that other processes map. `sha256` (hex) covers
    width, height and pixels, not the file. `source_width` and `source_height` are the file's, before its EXIF
    `orientation` (1 to 8) was applied. `notes` are sentences for the user about what was done to it. `fetch_ms` and
    `decode_ms` are wall times in milliseconds.
    """

    rgb: bytes | mmap = field(repr=False)
    width: int
    height: int
    sha256: str
    format: str
    source_width: int
    source_height: int
    orientation: int = 1
    notes: tuple[str, ...] = ()
    fetch_ms: float = 0.0
    decode_ms: float = 0.0
