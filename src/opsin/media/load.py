"""The room's one verb: whatever the caller has, as a checked Picture."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from opsin.core.errors import BadParameter, BadPicture, FetchFailed
from opsin.core.picture import Picture
from opsin.media.colour import flatten_array
from opsin.media.decode import OpenPicture, decode_image, finish
from opsin.media.limits import check_bytes, check_size, show
from opsin.media.source import read_data_url, read_file

if TYPE_CHECKING:
    from opsin.core.settings import MediaSettings

# Pillow images and NumPy arrays count too, but naming them here would import both.
Source: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | Picture | OpenPicture | Any

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_NAME = "The picture"


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
    opened: Any = source
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        name, opened = _read(source, settings)
    fetched = time.perf_counter()
    if isinstance(opened, bytes):
        opened = OpenPicture(opened, settings, name)
    # Neither Pillow nor NumPy is imported for a source that is neither.
    pil, numpy = sys.modules.get("PIL.Image"), sys.modules.get("numpy")
    if isinstance(opened, OpenPicture):
        picture = opened.decode(longest_edge)
    elif pil is not None and isinstance(opened, pil.Image):
        check_size(opened.width, opened.height, _NAME, settings)
        picture = decode_image(opened, _NAME, longest_edge)
    elif numpy is not None and isinstance(opened, numpy.ndarray):
        image, notes = flatten_array(opened, "The array", settings)
        picture = finish(image, "array", longest_edge, notes)
    else:
        raise BadParameter(
            "A picture can be a path, bytes, a Pillow image, a NumPy array or an address, "
            f"not a {type(source).__name__}."
        )
    decoded = time.perf_counter()
    return dataclasses.replace(picture, fetch_ms=(fetched - begin) * 1e3, decode_ms=(decoded - fetched) * 1e3)


def _read(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview, settings: MediaSettings
) -> tuple[str, bytes]:
    """A name for error sentences, and the bytes of a file."""
    if isinstance(source, bytes | bytearray | memoryview):
        check_bytes(memoryview(source).nbytes, _NAME, settings)
        return _NAME, bytes(source)
    if isinstance(source, os.PathLike):
        return show(source), read_file(source, settings)
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
