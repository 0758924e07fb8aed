"""Bytes of a picture file in, upright RGB pixels out, through the one decoder that the first bytes name.

Decoders are called directly, never through `Image.open`: no other plugin gets to see the bytes, and Pillow's own
process-wide pixel limit does not stand beside ours.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadPicture, OpsinError, PictureTooLarge, PictureUnsupported
from opsin.media import header
from opsin.media.flatten import flatten
from opsin.media.hush import hush_pillow, hushed_libtiff
from opsin.media.ifd import claims_too_much, tiff_pages
from opsin.media.sniff import picture_format
from opsin.media.upright import load_and_orient, turn_upright
from opsin.media.words import SUPPORTED, check_size, logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from opsin.core.settings import MediaSettings

_DNG_VERSION_TAG = 0xC612
_TILE_TAGS = (0x0142, 0x0143)
# Kinds whose plugins read tags before we can; EXIF in the others is left to us.
_WITH_DIRECTORIES = frozenset(("TIFF", "JPEG", "AVIF"))
# Pillow decodes run-length BMP in Python: bounds that keep it within seconds
_RLE_MOST_PIXELS = 16_000_000
_RLE_MOST_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Pixels:
    """Decoded pixels before they have an identity; sizes before the turn are the source's own."""

    image: Image.Image
    format: str
    source_width: int
    source_height: int
    orientation: int = 1
    notes: tuple[str, ...] = ()


def decode(data: bytes, name: str, settings: MediaSettings) -> Pixels:
    """Decode a picture file whole, within the limits of `settings`, which are checked before any pixel is.

    Colour profiles (ICC) are not applied. Of several frames or pages the first is taken, and a note says so. Raises
    PictureUnsupported, PictureTooLarge, or BadPicture for bytes that are damaged or cut short: grey is never invented
    for what is missing.
    """
    kind, image = _opened(data, name, settings)
    _guarded(lambda: _prepare(image, kind, data, name, settings), kind, name)
    return pixels_of(image, kind, name, data=data, notes=_frame_notes(kind, data, image))


def measure(data: bytes, name: str, settings: MediaSettings) -> tuple[int, int]:
    """Return width and height of a picture file by its header, without decoding it, within the limits of `settings`.

    They are the file's, before any turn. Raises what `decode` raises.
    """
    _, image = _opened(data, name, settings)
    return image.width, image.height


def _opened(data: bytes, name: str, settings: MediaSettings) -> tuple[str, Image.Image]:
    """The kind of a file, and its image of which the header was read and the size checked."""
    kind = picture_format(data, name)
    hush_pillow()
    if kind == "WEBP" and (size := header.webp_size(data)) is not None:
        check_size(size[0], size[1], name, settings)
    if kind in _WITH_DIRECTORIES and claims_too_much(data, whole=kind == "TIFF"):
        raise BadPicture(f"{name} holds tags that claim more than the file has, so it is damaged; save it again.")
    image = _guarded(lambda: _open(kind, data), kind, name)
    check_size(image.width, image.height, name, settings)
    return kind, image


def pixels_of(
    image: Image.Image, kind: str, name: str, *, data: bytes | None = None, notes: tuple[str, ...] = ()
) -> Pixels:
    """Load, flatten and turn a Pillow image whose size was checked; the image itself keeps its pixels.

    `data` are the bytes of its file, where they are known.
    """
    with hushed_libtiff() if kind == "TIFF" and _by_libtiff(image) else contextlib.nullcontext():
        turn, turned = _guarded(lambda: load_and_orient(image, data), kind, name)
    flat, more = _guarded(lambda: flatten(image, name), kind, name)
    width, height = flat.size
    if turned and turn >= 5:
        width, height = height, width
    if not turned:
        flat = turn_upright(flat, turn)
    return Pixels(flat, kind, width, height, turn, (*notes, *more))


def _by_libtiff(image: Image.Image) -> bool:
    return any(tile[0] == "libtiff" for tile in getattr(image, "tile", ()))


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


def _open(kind: str, data: bytes) -> Image.Image:
    """Read the header; pixels are not decoded yet."""
    module, plugin = _PLUGINS[kind]
    image: Image.Image = getattr(importlib.import_module(module), plugin)(io.BytesIO(data))
    return image


def _prepare(image: Image.Image, kind: str, data: bytes, name: str, settings: MediaSettings) -> None:
    """Refuse or mend, before pixels are decoded, what the decoder would take too lightly."""
    if kind == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        if _DNG_VERSION_TAG in tags:
            raise PictureUnsupported(f"{name} is a camera's raw file (DNG), which cannot be read; save it as JPEG.")
        # libtiff takes memory for a whole tile, however small the picture is
        tile = [tags.get(tag, 1) for tag in _TILE_TAGS]
        if all(isinstance(edge, int) and edge > 0 for edge in tile):
            check_size(tile[0], tile[1], name, settings)
    slow = image.width * image.height > _RLE_MOST_PIXELS or len(data) > _RLE_MOST_BYTES
    if kind == "BMP" and image.info.get("compression") in {1, 2} and slow:
        raise PictureTooLarge(f"{name} is too large for a run-length BMP; save it as PNG.")
    clear = image.info.get("transparency")
    if kind == "PNG" and clear is not None:
        # Pillow brings samples to 8 bits, but leaves the transparent colour in the file's own depth
        depth = data[24]
        if image.mode == "RGB" and depth == 16:
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        elif image.mode == "L" and depth in {2, 4}:
            image.info["transparency"] = clear * (255 // (2**depth - 1))


def _frame_notes(kind: str, data: bytes, image: Image.Image) -> tuple[str, ...]:
    """One sentence when the file holds more pictures than the one taken."""
    counters: dict[str, Callable[[bytes], int]] = {
        "PNG": header.png_frames,
        "GIF": header.gif_frames,
        "TIFF": tiff_pages,
    }
    count = counters[kind](data) if kind in counters else int(getattr(image, "n_frames", 1))
    if count < 2:
        return ()
    many = f"{header.MOST_FRAMES:,} or more" if count >= header.MOST_FRAMES else str(count)
    if kind == "HEIF":
        return (f"the main one of {many} pictures was taken",)
    return (f"the first of {many} {'pages' if kind == 'TIFF' else 'frames'} was taken",)


def _guarded(step: Callable[[], Any], kind: str, name: str) -> Any:
    """Run a step of Pillow; whatever it raises becomes one sentence."""
    try:
        return step()
    except OpsinError:
        raise
    except MemoryError:
        raise PictureTooLarge(f"{name} does not fit the memory when decoded; scale it down first.") from None
    except Exception as error:
        # Pillow's parsers raise whatever a damaged header makes them stumble on: SyntaxError, KeyError,
        # struct.error, OverflowError, zlib.error and more; only the sentence differs
        from PIL.Image import DecompressionBombError

        logger.debug("%s cannot be decoded as %s: %r", name, kind, error)
        if isinstance(error, DecompressionBombError):
            raise PictureTooLarge(f"{name} has more pixels than can be read; scale it down first.") from error
        if isinstance(error, NotImplementedError):
            raise PictureUnsupported(f"{name} is a kind of {kind} that is not read ({SUPPORTED}).") from error
        if isinstance(error, ImportError):
            raise PictureUnsupported(
                f"{name} is {kind}, and this machine's Pillow or pillow-heif lacks the decoder; "
                "reinstall them, or save the picture as PNG."
            ) from error
        label = {"WEBP": "WebP", "HEIF": "HEIC"}.get(kind, kind)
        raise BadPicture(f"{name} is cut short or damaged ({label}); get a whole copy, or save it again.") from error
