"""Is a JPEG whole, and cheap enough to decode? libjpeg fills missing pixels with grey and does not tell.

Source: ITU-T T.81, annex B.
"""

from __future__ import annotations

import importlib
import io
import re
import struct
from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadPicture, PictureTooLarge
from opsin.media.limits import check_size, damaged

if TYPE_CHECKING:
    from PIL import Image

    from opsin.core.settings import MediaSettings

_MAX_SCANS = 100
_MAX_SEGMENTS = 10_000
# Within the compressed pixels, 0xFF is followed by zero or is a restart marker.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Bits that a block of 8x8 pixels takes at least, by the marker of the frame: two Huffman codes, one in a first scan of
# progressive files. Arithmetic coding has no such bound.
_LEAST_BITS = {0xC0: 2, 0xC1: 2, 0xC2: 1}
# Begins with zero in case the file ends in 0xFF; the restart markers are for files that wait for one of them.
_FILLER = b"".join(bytes((*range(200), 0xFF, 0xD0 + number % 8)) for number in range(16))


def check_jpeg(data: bytes, name: str, settings: MediaSettings) -> int:
    """Walk over the segments without decoding, and return where the compressed pixels end.

    Raises PictureTooLarge for a size beyond the limits and for more than 100 scans, each of which costs a pass over
    all pixels; BadPicture for more segments than any picture has, and for fewer bytes than its pixels take.
    """
    at, end, first, scans, least_bits = 2, len(data), len(data), 0, 0
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[1][0] == _END_OF_IMAGE:
            end = found.start() if found else end
            break
        marker, at = found[1][0], found.end()
        if marker in _FRAMES and at + 7 <= len(data) and not least_bits:
            height, width = struct.unpack_from(">HH", data, at + 3)
            check_size(width, height, name, settings)
            least_bits = _LEAST_BITS.get(marker, 0) * -(-width // 8) * -(-height // 8)
        at += int.from_bytes(data[at : at + 2], "big")
        if marker == _START_OF_SCAN:
            first, scans = min(first, at), scans + 1
            if scans > _MAX_SCANS:
                raise PictureTooLarge(
                    f"{name} is a JPEG of more than {_MAX_SCANS} scans, which takes too long to decode; save it again."
                )
    else:
        raise BadPicture(f"{name} has more than {_MAX_SEGMENTS:,} segments, so it is damaged; save it again.")
    if 8 * max(0, end - first) < least_bits:
        raise damaged("JPEG", name)
    return end


def is_cut_short(image: Image.Image, data: bytes, end: int) -> bool:
    """Whether libjpeg invented the end of a decoded image.

    It does so in mid grey. So if the last pixel is grey, the file is decoded again at an eighth of its size, with and
    without some bytes put in where its pixels end: they change nothing unless pixels are missing.
    """
    corner: Any = image.getpixel((image.width - 1, image.height - 1))
    if any(abs(value - 128) > 8 for value in (corner if isinstance(corner, tuple) else (corner,))):
        return False
    plain, filled = (_thumbnail(data[:end] + filler + b"\xff\xd9") for filler in (b"", _FILLER))
    return plain != filled


def _thumbnail(data: bytes) -> bytes:
    plugin = importlib.import_module("PIL.JpegImagePlugin")
    image: Image.Image = plugin.JpegImageFile(io.BytesIO(data))
    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    return image.tobytes()
