"""A checked picture: upright, opaque RGB pixels and the content identity made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from mmap import mmap


@dataclass(frozen=True, slots=True)
class Picture:
    """One decoded picture, turned upright, on white, 8 bit RGB.

    `rgb` holds `height * width * 3` bytes, row by row, maybe in memory that other processes map. `sha256` (hex) is taken over width, height and pixels, so
    the same picture in two file formats without loss has one identity. `notes` are sentences for the user, such as
    "the first of 12 frames was taken".
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
