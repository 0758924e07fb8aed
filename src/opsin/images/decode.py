"""Whatever the caller has in, an upright RGB image out, through the one decoder that the first bytes name.

Decoders are called directly, never through `PIL.Image.open`: no other plugin gets to see the bytes, and Pillow's own
process-wide pixel limit does not stand beside ours.
"""

import dataclasses
import hashlib
import importlib
import io
import logging
import os
import re
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadImage, BadParameter, FetchFailed, ImageTooLarge, ImageUnsupported, OpsinError
from opsin.core.image_options import ANY_SIZES, AS_IT_IS, ImageOptions, ImageSizes
from opsin.core.request import Image
from opsin.core.settings import ImageSettings
from opsin.images.colour import array_image, flatten
from opsin.images.show import fitted, shown, shown_again
from opsin.images.sniff import PDF, image_format
from opsin.images.source import check_bytes, check_size, damaged, read_data_url, read_file, show

if TYPE_CHECKING:
    import PIL.Image

logger = logging.getLogger("opsin.images")

_NAME = "The image"
# Counting frames takes time: pages of a TIFF up to here, and frames of a GIF in files up to so many bytes.
_MAX_PAGES, _MAX_COUNTED = 1_000, 8 * 2**20
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_ORIENTATION_TAG = 0x0112
_DNG_VERSION_TAG = 0xC612
_TILE_TAGS = (0x0142, 0x0143)
# Pillow decodes run-length BMP in Python: these bounds keep it within seconds.
_RLE_MAX_PIXELS = 16_000_000
_RLE_MAX_BYTES = 8 * 2**20
_SIDEWAYS = 5  # from this EXIF orientation on, width and height change places
_SPARE = 2  # pixels of a JPEG that is read in part, for one that the model sees
# Of JPEG; source: ITU-T T.81, annex B.
MAX_SCANS = 100
MAX_SEGMENTS = 10_000
# Within the compressed pixels, 0xFF is followed by zero or is a restart marker.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_JPEG_END = b"\xff\xd9"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_LOSSLESS = frozenset({0xC3, 0xC7, 0xCB, 0xCF})  # which libjpeg cannot decode at a part of their size
# Bits that a block of 8x8 pixels takes at least, by the marker of the frame: two Huffman codes, one in a first scan of
# progressive files. Arithmetic coding has no such bound.
_LEAST_BITS = {0xC0: 2, 0xC1: 2, 0xC2: 1}
# Bytes that a JPEG is filled up with, to see whether pixels are missing: for one that ends as it should, and for one
# without an end marker. The first begins with zero in case the file ends in 0xFF.
_FILLERS = bytes(range(200)), *(bytes([bits] * 200) for bits in (0xFE, 0x55, 0xAA))
# Pillow's plugins, imported when their first image comes; HEIF has a package of its own.
_PLUGINS = {"PNG": "Png", "JPEG": "Jpeg", "WEBP": "WebP", "GIF": "Gif", "BMP": "Bmp", "TIFF": "Tiff", "AVIF": "Avif"}


class OpenImage:
    """An image file whose header was read and whose size was checked; no pixel is decoded yet.

    `image` is Pillow's, `width` and `height` are the file's, before any turn. Of a TIFF `page` is read (None: the
    first, with a note that there are others). Raises ImageUnsupported, ImageTooLarge, or BadImage for damaged bytes.
    """

    def __init__(self, data: bytes, settings: ImageSettings, name: str = _NAME, page: int | None = None) -> None:
        check_bytes(len(data), name, settings)
        self._data, self._name, self._settings, self._page = data, name, settings, page
        self._kind = image_format(data, name)
        if self._kind == PDF:
            raise ImageUnsupported(f"{name} is a PDF document and not one image; read its pages with Opsin.images.")
        end, scans_whole, frame = check_jpeg(data, name, settings) if self._kind == "JPEG" else (0, False, 0)
        self._scales = self._kind == "JPEG" and frame not in _LOSSLESS
        self._jpeg_open = self._kind == "JPEG" and data[end : end + 2] != _JPEG_END
        if self._jpeg_open:
            if not scans_whole:  # a progressive file may end between two scans
                raise damaged(self._kind, name)
            data = data[:end].rstrip(b"\xff") + _JPEG_END  # it may have half of its end marker
        self._jpeg_end = end if not self._jpeg_open else len(data) - 2
        with one_sentence(self._kind, name):
            self.image = _open(self._kind, data)
            if page is not None:
                self.image.seek(page - 1)
        self.width, self.height = self.image.size
        check_size(self.width, self.height, name, settings, wide=self.image.mode in {"I", "F"})

    @property
    def pages(self) -> int:
        """How many pages a TIFF has, up to 1,000; any other file has one."""
        if self._kind != "TIFF":
            return 1
        pages = 0
        with one_sentence(self._kind, self._name), suppress(EOFError):
            other = _open(self._kind, self._data)
            while pages < _MAX_PAGES:  # Pillow's own way to count takes quadratic time
                other.seek(pages)
                pages += 1
        return pages

    def decode(self, options: ImageOptions = AS_IT_IS, sizes: ImageSizes = ANY_SIZES) -> list[Image]:
        """Decode the whole file, once: the image as the options show it. Of several frames or pages the first is taken.

        A JPEG that lacks nothing but its end marker is read; one that has far more pixels than what the model sees of
        it is read at a half, a quarter or an eighth of its size, by libjpeg. Notes say so. Raises BadImage for bytes
        that are damaged or cut short: grey is never invented for what is missing.
        """
        with one_sentence(self._kind, self._name):
            part: tuple[str, ...] = ()
            if self._scales and not (options.region or options.tiles):
                part = self._read_in_part(options, sizes)
            if self._kind == "TIFF":
                self._check_tiff()
            elif self._kind == "PNG":
                self._correct_transparency()
            elif self._kind == "BMP":
                slow = self.width * self.height > _RLE_MAX_PIXELS or len(self._data) > _RLE_MAX_BYTES
                if slow and self.image.info.get("compression") in {1, 2}:
                    raise ImageTooLarge(f"{self._name} is too large for a run-length BMP; save it as PNG.")
            elif self._kind == "HEIF":
                # The container's own turn counts, and libheif has applied it; EXIF beside it is only a copy.
                boxes = self._data.partition(b"mdat")[0]
                if b"irot" not in boxes and b"imir" not in boxes:
                    self.image.info["original_orientation"] = 1
            notes = ("the end marker of the JPEG is missing, and nothing else",) if self._jpeg_open else self._frames()
            about = Image(b"", self.width, self.height, "", self._kind, notes=notes + part)
            images = make_images(self.image, about, self._name, options, sizes)
            if self._kind == "JPEG" and self._is_cut_short():
                raise damaged(self._kind, self._name)
            return images

    def _read_in_part(self, options: ImageOptions, sizes: ImageSizes) -> tuple[str, ...]:
        """Let libjpeg leave out pixels of a large JPEG; a note where nothing else says that it has fewer."""
        across, down, _ = fitted(self.width, self.height, options, sizes)
        is_fitted = (across, down) != (self.width, self.height)
        if not is_fitted:
            across = down = sizes.edge
        if across:
            self.image.draft(None, (_SPARE * across, _SPARE * down))
        times = round(self.width / self.image.width)
        read = f"read at 1/{times} of its size, as the model sees {sizes.edge} pixels"
        return (read,) if times > 1 and not is_fitted else ()

    def _frames(self) -> tuple[str, ...]:
        """A note for a file of several frames or pages, of which one is read."""
        if self._page is not None or not getattr(self.image, "is_animated", False):
            return ()
        count = "several"
        if self._kind == "TIFF":
            pages = self.pages
            count = f"{pages:,}{' or more' if pages == _MAX_PAGES else ''}"
        elif self._kind != "GIF" or len(self._data) <= _MAX_COUNTED:
            count = f"{getattr(self.image, 'n_frames', 1):,}"
        return (f"only the {'main one' if self._kind == 'HEIF' else 'first'} of {count} frames or pages was read",)

    def _check_tiff(self) -> None:
        tags: Any = getattr(self.image, "tag_v2", {})
        if _DNG_VERSION_TAG in tags:
            raise ImageUnsupported(f"{self._name} is a camera's raw file (DNG), which cannot be read; save it as JPEG.")
        # libtiff allocates a whole tile, however small the image is.
        tile = [tags.get(tag, 1) for tag in _TILE_TAGS]
        if all(isinstance(edge, int) and edge > 0 for edge in tile):
            check_size(tile[0], tile[1], self._name, self._settings)

    def _correct_transparency(self) -> None:
        """Pillow brings samples to 8 bits, but leaves the transparent colour in the file's own depth."""
        info, mode, depth = self.image.info, self.image.mode, self._data[24]
        clear = info.get("transparency")
        if clear is not None and mode == "RGB" and depth == 16:
            info["transparency"] = tuple(value >> 8 for value in clear)
        elif clear is not None and mode == "L" and depth in {2, 4}:
            info["transparency"] = clear * (255 // (2**depth - 1))

    def _is_cut_short(self) -> bool:
        """Whether libjpeg invented the end of a decoded JPEG.

        It does so in mid grey. So if the last pixel is grey, the file is decoded again at an eighth of its size, with
        and without some bytes put in where its pixels end: they change nothing unless pixels are missing. Without an
        end marker a part of the last block may be missing: then it is decoded at its full size, with more such bytes.
        """
        corner: Any = self.image.getpixel((self.image.width - 1, self.image.height - 1))
        if not self._jpeg_open and any(abs(v - 128) > 8 for v in (corner if isinstance(corner, tuple) else (corner,))):
            return False
        looks = set()
        for data in _filled(self._data[: self._jpeg_end], _FILLERS if self._jpeg_open else _FILLERS[:1]):
            image = _open("JPEG", data)
            if self._scales and not self._jpeg_open:
                image.draft(None, (max(1, self.width // 8), max(1, self.height // 8)))
            looks.add(hashlib.sha256(image.tobytes()).digest())
        return len(looks) > 1


def load_image(
    source: object, settings: ImageSettings, options: ImageOptions = AS_IT_IS, sizes: ImageSizes = ANY_SIZES
) -> Image:
    """`load_images` for options without tiles: one image."""
    return load_images(source, settings, options, sizes)[0]


def load_images(
    source: object,
    settings: ImageSettings,
    options: ImageOptions = AS_IT_IS,
    sizes: ImageSizes = ANY_SIZES,
    name: str = _NAME,
) -> list[Image]:
    """Turn `source` into a checked image: decoded, upright, opaque, in sRGB, within limits, with its identity.

    `source` is a path, the bytes of a file, a Pillow image (its current frame), a NumPy array ((h, w), (h, w, 3) or
    (h, w, 4); uint8, uint16 or floats 0..1), a `data:` address, with `settings.fetch` an http(s) address, or an image
    that was loaded before; it is never changed. EXIF orientation and colour profiles (ICC) are applied. `options` say
    which part of it is shown, and in how many tokens; with tiles these follow the whole image. `sizes` are the model's:
    a file may have fewer pixels than it has, where the model sees no more. `~` in a path is the home folder. `name`
    is what sentences call a source that has none. May be called from any thread.

    `fetch_ms` is the time to get the bytes, `decode_ms` all the rest, both wall time in milliseconds. Raises
    BadImage, ImageTooLarge, ImageUnsupported, FetchFailed, or BadParameter for a source of another type and a part that
    is not there.
    """
    if isinstance(source, Image):
        return shown_again(source, options, sizes)
    begin = time.perf_counter()
    name, found = read_source(source, settings, name)
    fetched = time.perf_counter()
    # Neither Pillow nor NumPy is imported for a source that is neither.
    pil, numpy = sys.modules.get("PIL.Image"), sys.modules.get("numpy")
    if isinstance(found, bytes):
        images = OpenImage(found, settings, name).decode(options, sizes)
    elif pil is not None and isinstance(found, pil.Image):
        check_size(found.width, found.height, _NAME, settings)
        about = Image(b"", found.width, found.height, "", found.format or "PIL")
        images = make_images(found, about, _NAME, options, sizes)
    elif numpy is not None and isinstance(found, numpy.ndarray):
        made = array_image(found, settings)
        images = make_images(made, Image(b"", made.width, made.height, "", "array"), _NAME, options, sizes)
    else:
        raise BadParameter(
            f"A {type(source).__name__} is no image: give a path, bytes, a Pillow image, a NumPy array or an address."
        )
    decoded = time.perf_counter()
    fetch_ms, decode_ms = (fetched - begin) * 1e3, (decoded - fetched) * 1e3
    return [dataclasses.replace(images[0], fetch_ms=fetch_ms, decode_ms=decode_ms), *images[1:]]


def read_source(source: object, settings: ImageSettings, name: str = _NAME) -> tuple[str, Any]:
    """A name for error sentences, and the bytes of a file; a source that is open already comes back as it is.

    Raises what `load_images` raises of files and addresses.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        check_bytes(memoryview(source).nbytes, name, settings)
        return name, bytes(source)
    if isinstance(source, os.PathLike):
        return show(source), read_file(source, settings)
    if not isinstance(source, str):
        return _NAME, source
    if source[:5].lower() == "data:":
        return "The data: address", read_data_url(source, settings)
    if not _SCHEME.match(source):
        if not source:
            raise BadImage("The path of the image is empty; give a file.")
        return show(source), read_file(source, settings)
    if not settings.fetch:
        raise FetchFailed(
            "Images are not fetched from addresses unless ImageSettings.fetch or --fetch-images says so; "
            "switch it on, or give the file itself."
        )
    from anyio.from_thread import start_blocking_portal

    from opsin.images.fetch import fetch, show_url

    with start_blocking_portal() as portal:  # a thread, as this one may run an event loop already; Ctrl-C ends it
        return show_url(source), portal.call(fetch, source, settings)


def make_images(
    image: "PIL.Image.Image", about: Image, name: str, options: ImageOptions, sizes: ImageSizes
) -> list[Image]:
    """Load an image whose size was checked, turn it upright, flatten it, and show it as the options say.

    `about` has the file's size before any turn, format and notes. The image is not changed. Raises BadImage,
    ImageTooLarge, BadParameter.
    """
    with one_sentence(about.format, name):
        orientation, size = _orientation(image), (about.width, about.height)
        in_part = image.size != size
        image.load()
        upright = image
        # TIFF pixels come turned out of Pillow, HEIC pixels out of libheif: they must not be turned twice.
        if orientation != 1 and image.format not in {"TIFF", "HEIF"}:
            from PIL import ImageOps

            upright = ImageOps.exif_transpose(image)
        flat, more = flatten(upright, name)
        turned = (f"turned upright (EXIF orientation {orientation})",) if orientation != 1 else ()
        about = dataclasses.replace(about, orientation=orientation, notes=(*about.notes, *turned, *more))
        whole = flat.size if not in_part else size[::-1] if orientation >= _SIDEWAYS else size
        return shown(flat, whole, about, options, sizes)


def check_jpeg(data: bytes, name: str, settings: ImageSettings) -> tuple[int, bool, int]:
    """Walk over the segments without decoding: where the pixels end, whether no scan is missing, the frame's marker.

    Raises ImageTooLarge for a size beyond the limits and for more than 100 scans, each of which costs a pass over
    all pixels; BadImage for more segments than any image has, and for fewer bytes than its pixels take.
    """
    at, end, first, scans, least_bits, components, frame = 2, len(data), len(data), 0, 0, 0, 0
    done: set[tuple[int, int]] = set()  # coefficients of components whose last bit is there
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[1][0] == _END_OF_IMAGE:
            end = found.start() if found else end
            break
        marker, at = found[1][0], found.end()
        if marker in _FRAMES and at + 8 <= len(data) and not least_bits:
            height, width, components = struct.unpack_from(">HHB", data, at + 3)
            check_size(width, height, name, settings)
            frame = frame or marker
            least_bits = _LEAST_BITS.get(marker, 0) * -(-width // 8) * -(-height // 8)
        head, at = at + 3, at + int.from_bytes(data[at : at + 2], "big")
        if marker == _START_OF_SCAN:
            if at <= len(data) and not data[at - 1] & 15:
                places = range(data[at - 3], min(64, data[at - 2] + 1))
                done |= {(component, place) for component in data[head : min(at - 3, head + 8) : 2] for place in places}
            first, scans = min(first, at), scans + 1
            if scans > MAX_SCANS:
                raise ImageTooLarge(
                    f"{name} is a JPEG of more than {MAX_SCANS} scans, which takes too long to decode; save it again."
                )
    else:
        raise BadImage(f"{name} has more than {MAX_SEGMENTS:,} segments, so it is damaged; save it again.")
    if 8 * max(0, end - first) < least_bits:
        raise damaged("JPEG", name)
    return end, len(done) == 64 * components, frame


def _filled(data: bytes, fillers: Sequence[bytes]) -> Iterator[bytes]:
    """A JPEG with an end marker put in: as it is, then after each of the fillers and the restart markers to come."""
    marks = re.findall(rb"\xff([\xd0-\xd7])", data[max(0, data.rfind(b"\xff\xda")) :])
    first = marks[-1][0] + 1 if marks else 0
    yield data + _JPEG_END
    for filler in fillers:
        rest = (filler + bytes((0xFF, 0xD0 + (first + number) % 8)) for number in range(16))
        yield data + b"".join(rest) + _JPEG_END


def _open(kind: str, data: bytes) -> "PIL.Image.Image":
    """Read a file's header with the one plugin for its kind."""
    stem = _PLUGINS.get(kind)
    module = importlib.import_module(f"PIL.{stem}ImagePlugin" if stem else "pillow_heif")
    image: PIL.Image.Image = getattr(module, f"{stem or 'Heif'}ImageFile")(io.BytesIO(data))
    return image


def _orientation(image: "PIL.Image.Image") -> int:
    """EXIF orientation 1 to 8; asked before the pixels are loaded, as Pillow drops it from a TIFF afterwards."""
    try:
        heif = image.format == "HEIF"  # pillow-heif resets the tag
        value = image.info.get("original_orientation") if heif else image.getexif().get(_ORIENTATION_TAG)
    except Exception as error:  # noqa: BLE001 - damaged EXIF may raise anything, and does not spoil the image
        logger.debug("EXIF that cannot be read is ignored: %r", error)
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@contextmanager
def one_sentence(kind: str, name: str) -> Iterator[None]:
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
    except (NotImplementedError, ImportError) as error:
        raise ImageUnsupported(
            f"{name} is a kind of {kind} that this machine's Pillow or pillow-heif cannot read; save it as PNG."
        ) from error
    except Exception as error:
        logger.debug("%s cannot be decoded as %s: %r", name, kind, error)
        if isinstance(error, MemoryError) or type(error).__name__ == "DecompressionBombError":
            raise ImageTooLarge(f"{name} is too large to be decoded; scale it down first.") from None
        if "MAX_TEXT" in str(error):  # Pillow's limits on text in PNG: 1 MiB each, 64 MiB in all
            raise BadImage(f"{name} holds more text beside its pixels than is read; save it without it.") from error
        raise damaged(kind, name) from error
