"""Bytes from a file or a `data:` address."""

from __future__ import annotations

import base64
import binascii
import errno
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
# Without waiting: opening a pipe that nobody writes to would block for ever.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_REASONS = {
    errno.ENOENT: "There is no file {name}; check the path.",
    errno.ENOTDIR: "There is no file {name}; check the path.",
    errno.EACCES: "{name} may not be read by this user; change its permissions.",
    errno.EPERM: "{name} may not be read by this user; change its permissions.",
    errno.ENAMETOOLONG: "The path {name} is too long to be a file's; check what was given as the picture.",
    errno.ELOOP: "{name} is a link that leads back to itself; give the file itself.",
    errno.EISDIR: "{name} is a folder, not a picture; give a file in it.",
}


def read_file(path: str | os.PathLike[str], settings: MediaSettings) -> bytes:
    """Read a picture file, or a pipe, up to the limit on bytes; its size is checked before its contents are read.

    Raises BadPicture when there is no such file, or it is a folder, a device, unreadable, or a pipe that nobody writes
    to; PictureTooLarge.
    """
    name = show(path)
    try:
        descriptor = os.open(path, _FLAGS)
        try:
            begin = _check_kind(descriptor, name, settings)
            with open(descriptor, "rb", closefd=False) as file:
                data = begin + file.read(settings.max_bytes + 1)
        finally:
            os.close(descriptor)
    except ValueError:
        raise BadPicture(f"The path {name} holds a character that no path can; check it.") from None
    except OSError as error:
        sentence = _REASONS.get(error.errno or 0, "{name} cannot be read ({why}); check the file and its disk.")
        why = show(error.strerror or type(error).__name__)
        raise BadPicture(sentence.format(name=name, why=why)) from error
    check_bytes(len(data), name, settings)
    return data


def _check_kind(descriptor: int, name: str, settings: MediaSettings) -> bytes:
    """Refuse what is not a file or a pipe; returns what was read of a pipe already."""
    info = os.fstat(descriptor)
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, "folder")
    if stat.S_ISFIFO(info.st_mode):
        return _wait_for_writer(descriptor, name)
    if not stat.S_ISREG(info.st_mode):
        raise BadPicture(f"{name} is a device, not a file; give a picture file.")
    check_bytes(info.st_size, name, settings)
    return b""


def _wait_for_writer(descriptor: int, name: str) -> bytes:
    """The first bytes from a pipe, which blocks from then on. Raises BadPicture when nobody writes in time."""
    deadline = time.monotonic() + _PIPE_SECONDS
    while True:
        try:
            if begin := os.read(descriptor, 65_536):
                break
        except BlockingIOError:  # somebody has opened it, and may take their time
            begin = b""
            break
        if time.monotonic() > deadline:
            raise BadPicture(f"{name} is a pipe that nobody writes to, not a regular file; give a picture file.")
        time.sleep(0.02)
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
