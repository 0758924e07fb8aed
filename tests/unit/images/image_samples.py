"""Small valid images in every format, made anew: nothing is shipped, nothing is fetched."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image

from opsin.core.settings import ImageSettings

LIMITS = ImageSettings()
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "GIF": {},
    "WEBP": {"lossless": True, "exact": True},
}
LOSSY: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 97, "subsampling": 0},
    "WEBP": {"quality": 97},
    "AVIF": {"quality": 97, "subsampling": "4:4:4"},
    "HEIF": {"quality": 97, "chroma": 444},
}
EVERY: list[tuple[str, dict[str, Any]]] = [
    *LOSSLESS.items(),
    *LOSSY.items(),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg", "quality": 97}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", {"big_tiff": True}),
    ("JPEG", {"quality": 97, "subsampling": 0, "progressive": True}),
]


def scene(width: int = 48, height: int = 32) -> PIL.Image.Image:
    """An image no turn or mirror leaves alike: four flat corners of different colour, few colours in all."""
    pixels = np.empty((height, width, 3), np.uint8)
    half_h, half_w = height // 2, width // 2
    pixels[:half_h, :half_w] = (200, 30, 30)
    pixels[:half_h, half_w:] = (30, 170, 40)
    pixels[half_h:, :half_w] = (30, 40, 190)
    pixels[half_h:, half_w:] = (230, 220, 60)
    pixels[: height // 4, : width // 4] = (10, 10, 10)
    return PIL.Image.fromarray(pixels)


def encode(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of `image` as a file of `kind`."""
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rgb_of(image: Any) -> np.ndarray[Any, Any]:
    """An image's pixels as an array (height, width, 3)."""
    return np.frombuffer(image.rgb, np.uint8).reshape(image.height, image.width, 3)


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk with a right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes | None, *before: bytes) -> bytes:
    """A PNG of any header around `rows` (None: no data at all); `before` are chunks between IHDR and IDAT."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = b"" if rows is None else chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + data + chunk(b"IEND", b"")


def tiff(entries: list[tuple[int, int, int, int | bytes]], data: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF of one directory at offset 8; an entry is (tag, type, count, value or 4 raw bytes)."""
    body = b"".join(
        struct.pack("<HHI", tag, kind, count) + (value if isinstance(value, bytes) else struct.pack("<I", value))
        for tag, kind, count, value in entries
    )
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(entries)) + body + struct.pack("<I", following) + data


def grey_tiff(width: int, height: int, bits: int, data: bytes, sample_format: int = 1, white_is: int = 1) -> bytes:
    """A one-strip uncompressed grey TIFF; `white_is` 0 means that 0 is white."""
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, white_is),
        (273, 4, 1, 8 + 2 + 10 * 12 + 4),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (339, 3, 1, sample_format),
    ]
    return tiff(list(tags), data)
