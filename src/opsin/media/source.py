"""Bytes from a file or a `data:` address."""

from __future__ import annotations

import base64
import binascii
import os
import stat
import time
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from opsin.core.errors import BadPicture
from opsin.media.limits import check_bytes, show

if TYPE_CHECKING:
    from opsin.core.settings import MediaSettings

_PIPE_SECONDS = 5.0


def read_file(path: str | os.PathLike[str], settings: MediaSettings) -> bytes:
    """Read an image file, or a pipe, up to the limit on bytes; a file's size is checked before it is read.

    Raises BadPicture when there is no such file, or it is a folder, a device, unreadable, or a pipe that nobody writes
    to; PictureTooLarge.
    """
    name = show(path)
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            info, begin = os.fstat(file.fileno()), b""
            if stat.S_ISFIFO(info.st_mode):
                begin = _wait_for_writer(file.fileno(), name)
            elif stat.S_ISREG(info.st_mode):
                check_bytes(info.st_size, name, settings)
            else:
                raise BadPicture(f"{name} is a device, not a file; give a picture file.")
            data = begin + file.read(settings.max_bytes + 1)
    except ValueError:
        raise BadPicture(f"The path {name} holds a character that no path can; check it.") from None
    except IsADirectoryError:
        raise BadPicture(f"{name} is a folder, not a picture; give a file in it.") from None
    except (FileNotFoundError, NotADirectoryError):
        raise BadPicture(f"There is no file {name}; check the path.") from None
    except OSError as error:
        why = show(error.strerror or type(error).__name__).lower()
        raise BadPicture(f"{name} cannot be read ({why}); check the path, its permissions and its disk.") from error
    check_bytes(len(data), name, settings)
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe that nobody writes to would block for ever


def _wait_for_writer(descriptor: int, name: str) -> bytes:
    """The first bytes from a pipe, which blocks from then on. Raises BadPicture when nobody writes in time."""
    deadline, begin = time.monotonic() + _PIPE_SECONDS, b""
    try:
        while not (begin := os.read(descriptor, 65_536)):
            if time.monotonic() > deadline:
                raise BadPicture(f"{name} is a pipe that nobody writes to, not a regular file; give a picture file.")
            time.sleep(0.02)
    except BlockingIOError:
        pass  # somebody has opened it, and may take their time
    os.set_blocking(descriptor, True)
    return begin


def read_data_url(url: str, settings: MediaSettings) -> bytes:
    """Read the bytes in a `data:` address (RFC 2397), base64 or percent-encoded; its media type is ignored.

    Padding may be missing and there may be spaces, as browsers allow. Raises BadPicture, PictureTooLarge.
    """
    name = "The data: address"
    head, comma, body = url[len("data:") :].partition(",")
    if not comma:
        raise BadPicture(f"{name} has no comma, so no contents; write data:image/png;base64,… instead.")
    # Percent signs can shrink it by a factor of three, base64 by a factor of four thirds.
    check_bytes(max(1, len(body) // 4 - 1024), name, settings)
    data = unquote_to_bytes(body) if "%" in body else body.encode("utf-8", "replace")
    if head.rstrip().lower().endswith(";base64"):
        packed = b"".join(data.split()).rstrip(b"=")
        try:
            data = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
        except binascii.Error:
            raise BadPicture(f"{name} holds damaged base64; encode the picture's bytes again.") from None
    check_bytes(len(data), name, settings)
    return data
