"""Bytes of a picture file in, upright RGB pixels out, through the one decoder that the first bytes name.

Decoders are called directly, never through `Image.open`: no other plugin gets to see the bytes, and Pillow's own
process-wide pixel limit does not stand beside ours.
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from opsin.core.errors import BadPicture, OpsinError, PictureTooLarge, PictureUnsupported
from opsin.media.colour import flatten
from opsin.media.jpeg import check_jpeg, is_cut_short
from opsin.media.limits import SUPPORTED, check_bytes, check_size, logger
from opsin.media.sniff import picture_format

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from opsin.core.settings import MediaSettings

_Result = TypeVar("_Result")

_ORIENTATION_TAG = 0x0112
_DNG_VERSION_TAG = 0xC612
_TILE_TAGS = (0x0142, 0x0143)
# Pillow decodes run-length BMP in Python: these bounds keep it within seconds.
_RLE_MOST_PIXELS = 16_000_000
_RLE_MOST_BYTES = 8 * 2**20
# The one plugin for each kind, imported when its first picture comes.
_PLUGINS = {
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "HEIF": ("pillow_heif", "HeifImageFile"),
}


@dataclass(frozen=True, slots=True)
class Pixels:
    """Decoded pixels before they are hashed; the source's sizes are those before it was turned upright."""

    image: Image.Image
    format: str
    source_width: int
    source_height: int
    orientation: int = 1
    notes: tuple[str, ...] = ()


class OpenPicture:
    """A picture file whose header was read and whose size was checked; no pixel is decoded yet.

    For callers that must know the size first: `width` and `height` are the file's, before any turn. `load_picture`
    takes it as a source, once. Raises PictureUnsupported, PictureTooLarge, or BadPicture for bytes that are damaged.
    """

    def __init__(self, data: bytes, settings: MediaSettings, name: str = "The picture") -> None:
        check_bytes(len(data), name, settings)
        self._data, self._name, self._settings = data, name, settings
        self._kind = picture_format(data, name)
        silence_pillow()
        if self._kind == "WEBP" and (size := _webp_size(data)) is not None:
            check_size(*size, name, settings)
        self._jpeg = check_jpeg(data, name) if self._kind == "JPEG" else None
        self._image: Image.Image = _guarded(self._read_header, self._kind, name)
        self.width, self.height = self._image.size
        check_size(self.width, self.height, name, settings, wide=self._image.mode in {"I", "F"})
        if self._jpeg is not None and self._jpeg.too_few:
            raise _damaged(self._kind, self._name)

    def decode(self) -> Pixels:
        """Decode the whole file, once. Of several frames or pages the first is taken, and a note says so.

        Colour profiles (ICC) are not applied. Raises BadPicture for bytes that are damaged or cut short: grey is
        never invented for what is missing.
        """
        return _guarded(self._decode, self._kind, self._name)

    def _read_header(self) -> Image.Image:
        module, plugin = _PLUGINS[self._kind]
        image: Image.Image = getattr(importlib.import_module(module), plugin)(io.BytesIO(self._data))
        return image

    def _decode(self) -> Pixels:
        self._refuse_slow_or_raw()
        notes = self._frame_notes()
        pixels = _to_pixels(self._image, self._kind, self._name, data=self._data, notes=notes)
        if self._jpeg is not None and is_cut_short(self._image, self._data, self._jpeg.end):
            raise _damaged(self._kind, self._name)
        return pixels

    def _refuse_slow_or_raw(self) -> None:
        """Refuse, or correct, what the decoder would take too lightly."""
        image, name = self._image, self._name
        if self._kind == "TIFF":
            tags: Any = getattr(image, "tag_v2", {})
            if _DNG_VERSION_TAG in tags:
                raise PictureUnsupported(f"{name} is a camera's raw file (DNG), which cannot be read; save it as JPEG.")
            # libtiff allocates a whole tile, however small the picture is.
            tile = [tags.get(tag, 1) for tag in _TILE_TAGS]
            if all(isinstance(edge, int) and edge > 0 for edge in tile):
                check_size(tile[0], tile[1], name, self._settings)
        slow = self.width * self.height > _RLE_MOST_PIXELS or len(self._data) > _RLE_MOST_BYTES
        if self._kind == "BMP" and image.info.get("compression") in {1, 2} and slow:
            raise PictureTooLarge(f"{name} is too large for a run-length BMP; save it as PNG.")
        clear = image.info.get("transparency")
        if self._kind == "PNG" and clear is not None:
            # Pillow brings samples to 8 bits, but leaves the transparent colour in the file's own depth.
            depth = self._data[24]
            if image.mode == "RGB" and depth == 16:
                image.info["transparency"] = tuple(value >> 8 for value in clear)
            elif image.mode == "L" and depth in {2, 4}:
                image.info["transparency"] = clear * (255 // (2**depth - 1))

    def _frame_notes(self) -> tuple[str, ...]:
        """One sentence when the file holds more pictures than the one taken."""
        if self._kind in {"GIF", "TIFF"}:  # counting theirs means walking through the whole file
            many = "several" if getattr(self._image, "is_animated", False) else ""
        else:
            count = int(getattr(self._image, "n_frames", 1))
            many = str(count) if count > 1 else ""
        if not many:
            return ()
        if self._kind == "HEIF":
            return (f"the main one of {many} pictures was taken",)
        return (f"the first of {many} {'pages' if self._kind == 'TIFF' else 'frames'} was taken",)


def decode_image(image: Image.Image, name: str = "The picture") -> Pixels:
    """The pixels of a Pillow image whose size was checked; it is not changed. Raises BadPicture, PictureTooLarge."""
    silence_pillow()
    kind = image.format or "PIL"
    return _guarded(lambda: _to_pixels(image, kind, name), kind, name)


def _to_pixels(
    image: Image.Image, kind: str, name: str, *, data: bytes | None = None, notes: tuple[str, ...] = ()
) -> Pixels:
    """Load, turn upright and flatten an image; `data` are the bytes of its file, where they are known."""
    orientation = _orientation(image, data)
    image.load()
    turned = image
    # TIFF pixels come turned out of Pillow, HEIC pixels out of libheif: they must not be turned twice.
    if orientation != 1 and image.format not in {"TIFF", "HEIF"}:
        from PIL import ImageOps

        turned = ImageOps.exif_transpose(image)
    flat, more = flatten(turned, name)
    width, height = flat.size
    if orientation >= 5:
        width, height = height, width
    return Pixels(flat, kind, width, height, orientation, (*notes, *more))


def _orientation(image: Image.Image, data: bytes | None) -> int:
    """EXIF orientation 1 to 8; asked before the pixels are loaded, as Pillow drops it from a TIFF afterwards.

    In HEIC and AVIF the container's own turn counts, and EXIF beside it is only a copy. Pillow sees to that for AVIF.
    """
    try:
        if image.format == "HEIF":
            properties = b"irot" if data is None else data.partition(b"mdat")[0]
            turned = b"irot" in properties or b"imir" in properties
            value = image.info.get("original_orientation") if turned else 1
        else:
            value = image.getexif().get(_ORIENTATION_TAG)
    except Exception as error:  # noqa: BLE001 - damaged EXIF may raise anything, and does not spoil the picture
        logger.debug("EXIF that cannot be read is ignored: %r", error)
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _guarded(step: Callable[[], _Result], kind: str, name: str) -> _Result:
    """Run a step of Pillow; whatever it raises becomes one sentence.

    Its parsers raise whatever a damaged header makes them stumble on: SyntaxError, KeyError, struct.error,
    OverflowError, zlib.error and more.
    """
    try:
        return step()
    except OpsinError:
        raise
    except MemoryError:
        raise PictureTooLarge(f"{name} does not fit the memory when decoded; scale it down first.") from None
    except Exception as error:
        logger.debug("%s cannot be decoded as %s: %r", name, kind, error)
        raise _explain(error, kind, name) from error


def _explain(error: Exception, kind: str, name: str) -> BadPicture:
    from PIL.Image import DecompressionBombError

    if isinstance(error, NotImplementedError):
        return PictureUnsupported(f"{name} is a kind of {kind} that is not read ({SUPPORTED}).")
    if isinstance(error, ImportError):
        return PictureUnsupported(
            f"{name} is {kind}, and this machine's Pillow or pillow-heif lacks the decoder; "
            "reinstall them, or save the picture as PNG."
        )
    if isinstance(error, DecompressionBombError):
        return PictureTooLarge(f"{name} has more pixels than can be read; scale it down first.")
    if "MAX_TEXT" in str(error):  # Pillow's limits on text in PNG: 1 MiB each, 64 MiB in all
        return BadPicture(f"{name} holds more text beside its pixels than is read; save it without metadata.")
    return _damaged(kind, name)


def _damaged(kind: str, name: str) -> BadPicture:
    label = {"WEBP": "WebP", "HEIF": "HEIC"}.get(kind, kind)
    return BadPicture(f"{name} is cut short or damaged ({label}); get a whole copy, or save it again.")


def silence_pillow() -> None:
    """Keep Pillow's remarks on metadata from reaching the caller as warnings, or as errors under `-W error`.

    Done anew for each picture, as filters are process-wide and others may put theirs in front. What Pillow logs goes
    where the program sends logs, and not to stderr when it sends them nowhere.
    """
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    log = logging.getLogger("PIL")
    if not log.handlers:
        log.addHandler(logging.NullHandler())


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in a WebP file's first chunk, or None; libwebp allocates its canvas as soon as it is opened."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None
