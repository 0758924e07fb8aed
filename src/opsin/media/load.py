"""The room's one verb: whatever the caller has, as a checked Picture."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from opsin.core.errors import BadParameter, BadPicture, FetchFailed
from opsin.core.picture import Picture
from opsin.media.colour import flatten_array
from opsin.media.decode import OpenPicture, Pixels, decode_image
from opsin.media.limits import check_bytes, check_size, show
from opsin.media.source import read_data_url, read_file

if TYPE_CHECKING:
    from opsin.core.settings import MediaSettings

# Pillow images and NumPy arrays count too, but naming them here would import both.
Source: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | Picture | OpenPicture | Any

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


def load_picture(source: Source, settings: MediaSettings, longest_edge: int | None = None) -> Picture:
    """Turn `source` into a checked picture: decoded, upright, opaque on white, within limits, with its identity.

    `source` is a path, the bytes of a file, a Pillow image (its current frame), a NumPy array ((h, w), (h, w, 3) or
    (h, w, 4); uint8, uint16 or floats 0..1), a `data:` address, or, where `settings.fetch` says so, an http(s)
    address; also an OpenPicture, and a Picture, which is returned as it is. Files are recognised by their bytes, never
    by their names. EXIF orientation is applied; colour profiles (ICC) are not. Of 16-bit samples the high byte counts.
    The source is never changed. May be called from any thread. With `longest_edge` a larger picture is shrunk so that
    its longer edge has that many pixels.

    `fetch_ms` is the time to get the bytes (from disk, the address or base64), `decode_ms` all the rest, both wall
    time in milliseconds. Raises BadPicture, PictureTooLarge, PictureUnsupported or FetchFailed with one sentence, and
    BadParameter for a source of another type.
    """
    if isinstance(source, Picture):
        return source
    begin = time.perf_counter()
    name, data = _fetch(source, settings)
    fetched = time.perf_counter()
    pixels = _decode_pixels(source, settings) if data is None else OpenPicture(data, settings, name).decode()
    image, notes = pixels.image, pixels.notes
    longer = max(image.size)
    if longest_edge is not None and longer > longest_edge:
        from PIL.Image import Resampling

        width, height = (max(1, edge * longest_edge // longer) for edge in image.size)
        image = image.resize((width, height), Resampling.LANCZOS)
        notes = (*notes, f"shrunk to {width} by {height} pixels")
    rgb = image.tobytes()
    return Picture(
        rgb=rgb,
        width=image.width,
        height=image.height,
        sha256=picture_sha256(image.width, image.height, rgb),
        format=pixels.format,
        source_width=pixels.source_width,
        source_height=pixels.source_height,
        orientation=pixels.orientation,
        notes=notes,
        fetch_ms=(fetched - begin) * 1e3,
        decode_ms=(time.perf_counter() - fetched) * 1e3,
    )


def picture_sha256(width: int, height: int, rgb: bytes) -> str:
    """Return the identity of RGB pixels: SHA-256 (hex) of width and height (32 bit, little-endian), then the pixels."""
    digest = hashlib.sha256(struct.pack("<II", width, height))
    digest.update(rgb)
    return digest.hexdigest()


def _fetch(source: Source, settings: MediaSettings) -> tuple[str, bytes | None]:
    """Return a name for sentences and the bytes of a file; no bytes for a source that is opened already."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        check_bytes(source.nbytes if isinstance(source, memoryview) else len(source), "The picture", settings)
        return "The picture", bytes(source)
    if isinstance(source, os.PathLike):
        return show(source), read_file(source, settings)
    if not isinstance(source, str):
        return "The picture", None
    if source[:5].lower() == "data:":
        return "The data: address", read_data_url(source, settings)
    scheme = _SCHEME.match(source)
    if scheme is None:
        if not source:
            raise BadPicture("The path of the picture is empty; give a file.")
        return show(source), read_file(source, settings)
    if scheme[1].lower() not in {"http", "https"}:
        raise FetchFailed(
            f"Addresses that begin with {show(scheme[0])} are not read; use http:// or https://, or give a file's path."
        )
    if not settings.fetch:
        raise FetchFailed(
            "Pictures are not fetched from addresses unless that is switched on (MediaSettings.fetch, --fetch-images); "
            "switch it on, or give the file itself."
        )
    from opsin.media.fetch import fetch, show_url

    return show_url(source), fetch(source, settings)


def _decode_pixels(source: Any, settings: MediaSettings) -> Pixels:
    """Take pixels from what is open already, without importing Pillow or NumPy for a source that is neither."""
    if isinstance(source, OpenPicture):
        return source.decode()
    if (pil := sys.modules.get("PIL.Image")) is not None and isinstance(source, pil.Image):
        check_size(source.width, source.height, "The picture", settings)
        return decode_image(source)
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(source, numpy.ndarray):
        image, notes = flatten_array(source, "The array", settings)
        return Pixels(image, "array", source.shape[1], source.shape[0], notes=notes)
    raise BadParameter(
        f"A picture can be a path, bytes, a Pillow image, a NumPy array or an address, not a {type(source).__name__}."
    )
