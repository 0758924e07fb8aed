"""Bytes of an image file in, upright RGB pixels out, through the one decoder that the first bytes name.

Decoders are called directly, never through `Image.open`: no other plugin gets to see the bytes, and Pillow's own
process-wide pixel limit does not stand beside ours.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadPicture, OpsinError, PictureTooLarge, PictureUnsupported
from opsin.core.picture import Picture
from opsin.media.colour import flatten
from opsin.media.jpeg import check_jpeg, is_cut_short
from opsin.media.limits import SUPPORTED, check_bytes, check_size, damaged
from opsin.media.sniff import picture_format

if TYPE_CHECKING:
    from PIL import Image

    from opsin.core.settings import MediaSettings

logger = logging.getLogger("opsin.media")

_ORIENTATION_TAG = 0x0112
_DNG_VERSION_TAG = 0xC612
_TILE_TAGS = (0x0142, 0x0143)
# Pillow decodes run-length BMP in Python: these bounds keep it within seconds.
_RLE_MAX_PIXELS = 16_000_000
_RLE_MAX_BYTES = 8 * 2**20
# Pillow's plugins, imported when their first image comes; HEIF has a package of its own.
_PLUGINS = {"PNG": "Png", "JPEG": "Jpeg", "WEBP": "WebP", "GIF": "Gif", "BMP": "Bmp", "TIFF": "Tiff", "AVIF": "Avif"}


class OpenPicture:
    """An image file whose header was read and whose size was checked; no pixel is decoded yet.

    `width` and `height` are the file's, before any turn. `load_picture` takes it as a source, once. Raises
    PictureUnsupported, PictureTooLarge, or BadPicture for bytes that are damaged.
    """

    def __init__(self, data: bytes, settings: MediaSettings, name: str = "The picture") -> None:
        check_bytes(len(data), name, settings)
        self._data, self._name, self._settings = data, name, settings
        self._kind = picture_format(data, name)
        if self._kind == "WEBP":
            check_size(*_webp_size(data), name, settings)
        self._jpeg_end = check_jpeg(data, name, settings) if self._kind == "JPEG" else 0
        with _one_sentence(self._kind, name):
            stem = _PLUGINS.get(self._kind)
            module = importlib.import_module(f"PIL.{stem}ImagePlugin" if stem else "pillow_heif")
            self._image: Image.Image = getattr(module, f"{stem or 'Heif'}ImageFile")(io.BytesIO(data))
        self.width, self.height = self._image.size
        check_size(self.width, self.height, name, settings, wide=self._image.mode in {"I", "F"})

    def decode(self, longest_edge: int | None = None) -> Picture:
        """Decode the whole file, once. Of several frames or pages the first is taken, and a note says so.

        Colour profiles (ICC) are not applied. Raises BadPicture for bytes that are damaged or cut short: grey is
        never invented for what is missing.
        """
        with _one_sentence(self._kind, self._name):
            if self._kind == "TIFF":
                self._check_tiff()
            elif self._kind == "PNG":
                self._correct_transparency()
            elif self._kind == "BMP":
                self._check_bmp()
            notes = self._frame_notes()
            # libheif has applied the container's own turn already, if there is one.
            turned = self._kind != "HEIF" or any(box in self._data.partition(b"mdat")[0] for box in (b"irot", b"imir"))
            picture = _to_picture(self._image, self._kind, self._name, longest_edge, notes, oriented=turned)
            if self._kind == "JPEG" and is_cut_short(self._image, self._data, self._jpeg_end):
                raise damaged(self._kind, self._name)
            return picture

    def _check_bmp(self) -> None:
        slow = self.width * self.height > _RLE_MAX_PIXELS or len(self._data) > _RLE_MAX_BYTES
        if slow and self._image.info.get("compression") in {1, 2}:
            raise PictureTooLarge(f"{self._name} is too large for a run-length BMP; save it as PNG.")

    def _check_tiff(self) -> None:
        tags: Any = getattr(self._image, "tag_v2", {})
        if _DNG_VERSION_TAG in tags:
            raise PictureUnsupported(
                f"{self._name} is a camera's raw file (DNG), which cannot be read; save it as JPEG."
            )
        # libtiff allocates a whole tile, however small the image is.
        tile = [tags.get(tag, 1) for tag in _TILE_TAGS]
        if all(isinstance(edge, int) and edge > 0 for edge in tile):
            check_size(tile[0], tile[1], self._name, self._settings)

    def _correct_transparency(self) -> None:
        """Pillow brings samples to 8 bits, but leaves the transparent colour in the file's own depth."""
        clear, depth, info = self._image.info.get("transparency"), self._data[24], self._image.info
        if clear is not None and self._image.mode == "RGB" and depth == 16:
            info["transparency"] = tuple(value >> 8 for value in clear)
        elif clear is not None and self._image.mode == "L" and depth in {2, 4}:
            info["transparency"] = clear * (255 // (2**depth - 1))

    def _frame_notes(self) -> tuple[str, ...]:
        """One sentence when the file holds more images than the one taken."""
        if not getattr(self._image, "is_animated", False):
            return ()
        if self._kind == "HEIF":
            return (f"the main one of {getattr(self._image, 'n_frames', 'several')} pictures was taken",)
        if self._kind in {"GIF", "TIFF"}:  # counting theirs means walking through the whole file
            return (f"the first of several {'frames' if self._kind == 'GIF' else 'pages'} was taken",)
        return (f"the first of {getattr(self._image, 'n_frames', 'several')} frames was taken",)


def decode_image(image: Image.Image, name: str, longest_edge: int | None) -> Picture:
    """The pixels of a Pillow image whose size was checked; it is not changed. Raises BadPicture, PictureTooLarge."""
    kind = image.format or "PIL"
    with _one_sentence(kind, name):
        return _to_picture(image, kind, name, longest_edge)


def finish(
    image: Image.Image,
    kind: str,
    longest_edge: int | None,
    notes: tuple[str, ...] = (),
    orientation: int = 1,
) -> Picture:
    """The picture of an upright RGB image, shrunk where its longer edge has more than `longest_edge` pixels."""
    source_size = image.size if orientation < 5 else image.size[::-1]
    longer = max(image.size)
    if longest_edge is not None and longer > longest_edge:
        from PIL.Image import Resampling

        width, height = (max(1, edge * longest_edge // longer) for edge in image.size)
        image = image.resize((width, height), Resampling.LANCZOS)
        notes = (*notes, f"shrunk to {width} by {height} pixels")
    rgb = image.tobytes()
    sha256 = picture_sha256(image.width, image.height, rgb)
    return Picture(rgb, image.width, image.height, sha256, kind, *source_size, orientation, notes)


def picture_sha256(width: int, height: int, rgb: bytes) -> str:
    """Return the identity of RGB pixels: SHA-256 (hex) of width and height (32 bit, little-endian), then the pixels."""
    digest = hashlib.sha256(struct.pack("<II", width, height))
    digest.update(rgb)
    return digest.hexdigest()


def _to_picture(
    image: Image.Image,
    kind: str,
    name: str,
    longest_edge: int | None,
    notes: tuple[str, ...] = (),
    *,
    oriented: bool = True,
) -> Picture:
    """Load an image, turn it upright and flatten it; unless it is `oriented`, its EXIF says nothing about its turn."""
    orientation = _orientation(image) if oriented else 1
    image.load()
    turned = image
    # TIFF pixels come turned out of Pillow, HEIC pixels out of libheif: they must not be turned twice.
    if orientation != 1 and image.format not in {"TIFF", "HEIF"}:
        from PIL import ImageOps

        turned = ImageOps.exif_transpose(image)
    flat, more = flatten(turned, name)
    return finish(flat, kind, longest_edge, (*notes, *more), orientation)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; asked before the pixels are loaded, as Pillow drops it from a TIFF afterwards."""
    try:
        heif = image.format == "HEIF"  # pillow-heif resets the tag
        value = image.info.get("original_orientation") if heif else image.getexif().get(_ORIENTATION_TAG)
    except Exception as error:  # noqa: BLE001 - damaged EXIF may raise anything, and does not spoil the image
        logger.debug("EXIF that cannot be read is ignored: %r", error)
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@contextmanager
def _one_sentence(kind: str, name: str) -> Iterator[None]:
    """Turn whatever Pillow's parsers raise on a damaged header (SyntaxError, struct.error, …) into one sentence.

    Pillow's remarks on metadata are kept from the caller, also as errors under `-W error`. The filter is set for each
    image, as others may put theirs in front. What Pillow logs goes where the program sends logs, else nowhere.
    """
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    log = logging.getLogger("PIL")
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    try:
        yield
    except OpsinError:
        raise
    except MemoryError:
        raise PictureTooLarge(f"{name} does not fit the memory when decoded; scale it down first.") from None
    except NotImplementedError as error:
        raise PictureUnsupported(f"{name} is a kind of {kind} that is not read ({SUPPORTED}).") from error
    except ImportError as error:
        raise PictureUnsupported(
            f"{name} is {kind}, and this machine's Pillow or pillow-heif lacks the decoder; "
            "reinstall them, or save the picture as PNG."
        ) from error
    except Exception as error:
        logger.debug("%s cannot be decoded as %s: %r", name, kind, error)
        if "MAX_TEXT" in str(error):  # Pillow's limits on text in PNG: 1 MiB each, 64 MiB in all
            raise BadPicture(
                f"{name} holds more text beside its pixels than is read; save it without metadata."
            ) from error
        raise damaged(kind, name) from error


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in a WebP file's first chunk; libwebp allocates its canvas as soon as it is opened."""

    def number(start: int, end: int) -> int:
        return int.from_bytes(data[start:end], "little")

    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + number(24, 27), 1 + number(27, 30)
    if chunk == b"VP8L" and data[20:21] == b"\x2f":
        return 1 + (number(21, 25) & 0x3FFF), 1 + (number(21, 25) >> 14 & 0x3FFF)
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF
    return 1, 1  # nothing that libwebp opens
