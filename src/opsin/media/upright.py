"""Which way up a picture is: its EXIF orientation, and whether the decoder has obeyed it already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opsin.media.ifd import ORIENTATION_TAG, exif_orientation
from opsin.media.words import logger

if TYPE_CHECKING:
    from PIL import Image


def load_and_orient(image: Image.Image, data: bytes | None) -> tuple[int, bool]:
    """Decode the pixels; tell the orientation (1 to 8) and whether the pixels came turned by it.

    TIFF pixels come turned out of Pillow, HEIC pixels out of libheif: they must not be turned twice. In HEIC and AVIF
    the container's own turn counts and EXIF beside it does not; Pillow hands AVIF's over as EXIF.
    """
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if ORIENTATION_TAG in tags:
        # Pillow drops the tag once it has turned the pixels
        turn = _checked(tags[ORIENTATION_TAG])
        image.load()
        return turn, True
    image.load()
    if image.format == "HEIF":
        return (_checked(image.info.get("original_orientation")) if data is None or _turns(data) else 1), True
    if image.format == "AVIF" and "exif" not in image.info:
        return 1, False
    if data is not None:
        return exif_orientation(_exif_block(image)), False
    try:
        return _checked(image.getexif().get(ORIENTATION_TAG)), False
    except Exception as error:  # noqa: BLE001 - a damaged EXIF block may raise anything, and unmakes no picture
        logger.debug("EXIF that cannot be read is left out: %r", error)
        return 1, False


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Undo EXIF orientation `orientation` (EXIF 2.32, tag 0x0112)."""
    from PIL.Image import Transpose

    ways = (
        None,
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )
    way = ways[orientation - 1]
    return image if way is None else image.transpose(way)


def _checked(value: object) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _exif_block(image: Image.Image) -> bytes:
    """The EXIF block a plugin found, or the one that ImageMagick writes into a PNG as hexadecimal text."""
    block = image.info.get("exif")
    if isinstance(block, bytes):
        return block
    text = image.info.get("Raw profile type exif")
    if not isinstance(text, str):
        return b""
    try:
        # three lines stand before the digits: nothing, the profile's name, its length
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return b""


def _turns(data: bytes) -> bool:
    """Whether a HEIC file's properties, which stand before its pixels, name a rotation or a mirror."""
    at = data.find(b"mdat")
    head = data[: at if at >= 0 else len(data)]
    return b"irot" in head or b"imir" in head
