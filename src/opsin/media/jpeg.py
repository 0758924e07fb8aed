"""Is a JPEG whole, and cheap enough to decode? libjpeg fills missing pixels with grey and does not tell.

Source: ITU-T T.81, annex B.
"""

from __future__ import annotations

import importlib
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadPicture, PictureTooLarge

if TYPE_CHECKING:
    from PIL import Image

_MOST_SCANS = 100
_MOST_SEGMENTS = 10_000
# Within the compressed pixels, 0xFF is followed by zero or is a restart marker.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_END = b"\xff\xd9"
# Bits that a block of 8x8 samples takes at least, by the marker of the frame: two Huffman codes, one in a first scan
# of progressive files. Arithmetic coding has no such bound.
_LEAST_BITS = {0xC0: 2, 0xC1: 2, 0xC2: 1}
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Begins with zero in case the file ends in 0xFF; the restart markers are for files that wait for one of them.
_FILLER = b"".join(bytes((*range(200), 0xFF, 0xD0 + number % 8)) for number in range(16))


@dataclass(frozen=True, slots=True)
class Scans:
    """Where the compressed pixels of a JPEG end, and whether they are too few for its size."""

    end: int
    too_few: bool


def check_jpeg(data: bytes, name: str) -> Scans:
    """Walk over the segments without decoding anything.

    Raises PictureTooLarge for more than 100 scans, each of which costs a pass over all pixels; BadPicture for more
    segments than any picture has.
    """
    at, scans, segments, first, blocks, least = 2, 0, 0, len(data), 0, 0
    end = len(data)
    while found := _MARKER.search(data, at):
        marker, at = data[found.start() + 1], found.end()
        segments += 1
        if segments > _MOST_SEGMENTS:
            raise BadPicture(f"{name} has more than {_MOST_SEGMENTS:,} segments, so it is damaged; save it again.")
        if marker == _END[1]:
            end = found.start()
            break
        size = int.from_bytes(data[at : at + 2], "big")
        if marker in _FRAMES and not blocks:
            blocks, least = _count_blocks(data[at + 2 : at + size]), _LEAST_BITS.get(marker, 0)
        if marker == 0xDA:
            first, scans = min(first, at + size), scans + 1
            if scans > _MOST_SCANS:
                raise PictureTooLarge(
                    f"{name} is a JPEG of more than {_MOST_SCANS} scans, which takes too long to decode; save it again."
                )
        at += size
    return Scans(end, too_few=8 * max(0, end - first) < blocks * least)


def _count_blocks(frame: bytes) -> int:
    """Blocks of all components, by the body of a frame header."""
    if len(frame) < 6:
        return 0
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    factors = [(each >> 4, each & 15) for each in frame[7::3]]
    across, down = (max((pair[axis] for pair in factors), default=1) or 1 for axis in (0, 1))
    return sum(-(-width * h // (8 * across)) * -(-height * v // (8 * down)) for h, v in factors)


def is_cut_short(image: Image.Image, data: bytes, end: int) -> bool:
    """Whether libjpeg invented the end of a decoded image.

    It does so in mid grey. So if the last pixel is grey, the file is decoded again at an eighth of its size, with and
    without some bytes put in where its pixels end: they change nothing unless pixels are missing.
    """
    corner: Any = image.getpixel((image.width - 1, image.height - 1))
    if any(abs(value - 128) > 8 for value in (corner if isinstance(corner, tuple) else (corner,))):
        return False
    plain, filled = (_thumbnail(data[:end] + filler + _END) for filler in (b"", _FILLER))
    return plain != filled


def _thumbnail(data: bytes) -> bytes:
    plugin = importlib.import_module("PIL.JpegImagePlugin")
    image: Image.Image = plugin.JpegImageFile(io.BytesIO(data))
    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    return image.tobytes()
