"""Whatever the caller has, as a checked Image: bytes from a file or an address, decoded."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import os
import re
import stat
import sys
import time
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote_to_bytes

from opsin.core.errors import BadImage, BadParameter, FetchFailed
from opsin.core.request import Image
from opsin.images.colour import flatten_array
from opsin.images.decode import OpenImage, make_image
from opsin.images.limits import check_bytes, check_size, show

if TYPE_CHECKING:
    from opsin.core.settings import ImageSettings

# Pillow images and NumPy arrays count too, but naming them here would import both.
Source: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | Image | OpenImage | Any

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_NAME = "The image"
_PIPE_SECONDS = 5.0


def load_image(source: Source, settings: ImageSettings, longest_edge: int | None = None) -> Image:
    """Turn `source` into a checked image: decoded, upright, opaque on white, within limits, with its identity.

    `source` is a path, the bytes of a file, a Pillow image (its current frame), a NumPy array ((h, w), (h, w, 3) or
    (h, w, 4); uint8, uint16 or floats 0..1), a `data:` address, with `settings.fetch` an http(s) address, an
    OpenImage, or an image, which is returned as it is; it is never changed. EXIF orientation is applied; colour
    profiles (ICC) are not. An image larger than `longest_edge` pixels is shrunk. May be called from any thread.

    `fetch_ms` is the time to get the bytes, `decode_ms` all the rest, both wall time in milliseconds. Raises
    BadImage, ImageTooLarge, ImageUnsupported, FetchFailed, or BadParameter for a source of another type.
    """
    if isinstance(source, Image):
        return source
    begin = time.perf_counter()
    name, opened = _read(source, settings)
    fetched = time.perf_counter()
    if isinstance(opened, bytes):
        opened = OpenImage(opened, settings, name)
    # Neither Pillow nor NumPy is imported for a source that is neither.
    pil, numpy = sys.modules.get("PIL.Image"), sys.modules.get("numpy")
    if isinstance(opened, OpenImage):
        image = opened.decode(longest_edge)
    elif pil is not None and isinstance(opened, pil.Image):
        check_size(opened.width, opened.height, _NAME, settings)
        image = make_image(opened, opened.format or "PIL", _NAME, longest_edge)
    elif numpy is not None and isinstance(opened, numpy.ndarray):
        flat, notes = flatten_array(opened, "The array", settings)
        image = make_image(flat, "array", _NAME, longest_edge, notes)
    else:
        raise BadParameter(
            f"A {type(source).__name__} is no image: give a path, bytes, a Pillow image, a NumPy array or an address."
        )
    decoded = time.perf_counter()
    return dataclasses.replace(image, fetch_ms=(fetched - begin) * 1e3, decode_ms=(decoded - fetched) * 1e3)


def _read(source: Source, settings: ImageSettings) -> tuple[str, Any]:
    """A name for error sentences, and the bytes of a file; a source that is open already comes back as it is."""
    if isinstance(source, bytes | bytearray | memoryview):
        check_bytes(memoryview(source).nbytes, _NAME, settings)
        return _NAME, bytes(source)
    if isinstance(source, os.PathLike):
        return show(source), read_file(source, settings)
    if not isinstance(source, str):
        return _NAME, source
    if source[:5].lower() == "data:":
        return "The data: address", read_data_url(source, settings)
    scheme = _SCHEME.match(source)
    if scheme is None:
        if not source:
            raise BadImage("The path of the image is empty; give a file.")
        return show(source), read_file(source, settings)
    if scheme[1].lower() not in {"http", "https"}:
        raise FetchFailed(
            f"Addresses that begin with {show(scheme[0])} are not read; use http:// or https://, or give a file's path."
        )
    if not settings.fetch:
        raise FetchFailed(
            "Images are not fetched from addresses unless ImageSettings.fetch or --fetch-images says so; "
            "switch it on, or give the file itself."
        )
    from opsin.images.fetch import fetch, show_url

    return show_url(source), fetch(source, settings)


def read_file(path: str | os.PathLike[str], settings: ImageSettings) -> bytes:
    """Read an image file, or a pipe, up to the limit on bytes; a file's size is checked before it is read.

    Raises BadImage when there is no such file, or it is a folder, a device, unreadable, or a pipe that nobody writes
    to; ImageTooLarge.
    """
    name = show(path)
    try:
        # Without waiting: opening a pipe that nobody writes to would block for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            info, begin = os.fstat(file.fileno()), b""
            if stat.S_ISFIFO(info.st_mode):
                begin = _wait_for_writer(file.fileno(), name)
            elif stat.S_ISREG(info.st_mode):
                check_bytes(info.st_size, name, settings)
            else:
                raise BadImage(f"{name} is a device, not a file; give an image file.")
            data = begin + file.read(settings.max_bytes + 1)
    except ValueError:
        raise BadImage(f"The path {name} holds a character that no path can; check it.") from None
    except IsADirectoryError:
        raise BadImage(f"{name} is a folder, not an image; give a file in it.") from None
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage(f"There is no file {name}; check the path.") from None
    except OSError as error:
        why = show(error.strerror or type(error).__name__).lower()
        raise BadImage(f"{name} cannot be read ({why}); check the path, its permissions and its disk.") from error
    check_bytes(len(data), name, settings)
    return data


def _wait_for_writer(descriptor: int, name: str) -> bytes:
    """The first bytes from a pipe, which blocks from then on. Raises BadImage when nobody writes in time."""
    deadline, begin = time.monotonic() + _PIPE_SECONDS, b""
    try:
        while not (begin := os.read(descriptor, 65_536)):
            if time.monotonic() > deadline:
                raise BadImage(f"{name} is a pipe that nobody writes to, not a regular file; give an image file.")
            time.sleep(0.02)
    except BlockingIOError:
        pass  # somebody has opened it, and may take their time
    os.set_blocking(descriptor, True)
    return begin


def read_data_url(url: str, settings: ImageSettings) -> bytes:
    """Read the bytes in a `data:` address (RFC 2397), base64 or percent-encoded; its media type is ignored.

    Padding may be missing and there may be spaces, as browsers allow. Raises BadImage, ImageTooLarge.
    """
    name = "The data: address"
    head, comma, body = url[len("data:") :].partition(",")
    if not comma:
        raise BadImage(f"{name} has no comma, so no contents; write data:image/png;base64,… instead.")
    # Percent signs can shrink it by a factor of three, base64 by a factor of four thirds.
    check_bytes(max(1, len(body) // 4 - 1024), name, settings)
    data = unquote_to_bytes(body) if "%" in body else body.encode("utf-8", "replace")
    if head.rstrip().lower().endswith(";base64"):
        packed = b"".join(data.split()).rstrip(b"=")
        try:
            data = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
        except binascii.Error:
            raise BadImage(f"{name} holds damaged base64; encode the image's bytes again.") from None
    check_bytes(len(data), name, settings)
    return data
