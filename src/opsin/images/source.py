"""Bytes of an image from a path, a pipe or a `data:` address, within limits that are checked before they are read."""

import base64
import binascii
import contextlib
import os
import select
import stat
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from opsin.core.errors import BadImage, ImageTooLarge
from opsin.core.files import expand
from opsin.core.settings import ImageSettings

_LONGEST_NAME = 160
_PIPE_SECONDS = 5.0
_PIECE = 16 * 2**20


def show(name: object) -> str:
    """`name` on one line: unprintable characters become "?", and the middle of a long name is left out."""
    text = "".join(char if char.isprintable() else "?" for char in str(name)[: 10 * _LONGEST_NAME])
    half = _LONGEST_NAME // 2
    return text if len(text) <= _LONGEST_NAME else f"{text[:half]}…{text[-half:]}"


def check_bytes(size: int, name: str, settings: ImageSettings) -> None:
    """Raise ImageTooLarge when `size` bytes are more than the settings allow, BadImage when there are none."""
    if size > settings.max_bytes:
        raise ImageTooLarge(
            f"{name} is larger than the {settings.max_bytes:,} bytes an image file may have; save it smaller first."
        )
    if size == 0:
        raise BadImage(f"{name} is empty (0 bytes); give a file that holds an image.")


def check_size(width: int, height: int, name: str, settings: ImageSettings, *, wide: bool = False) -> None:
    """Raise ImageTooLarge or BadImage unless `width` by `height` pixels are within the settings' limits.

    `wide`: the samples have 32 bits, so a quarter of the pixels is allowed.
    """
    most = settings.max_pixels // 4 if wide else settings.max_pixels
    if width < 1 or height < 1:
        raise BadImage(f"{name} claims a size of {width} by {height} pixels; give an image that has pixels.")
    if width * height > most or max(width, height) > settings.max_edge:
        raise ImageTooLarge(
            f"{name} has {width:,} by {height:,} pixels{' of 32-bit samples' if wide else ''}, and at most {most:,} in "
            f"all and {settings.max_edge:,} along an edge are read; scale it down first."
        )


def damaged(kind: str, name: str) -> BadImage:
    """The error for a file that cannot be decoded whole."""
    return BadImage(f"{name} is cut short or damaged ({kind}); get a whole copy, or save it again.")


def read_file(path: str | os.PathLike[str], settings: ImageSettings) -> bytes:
    """Read an image file, or a pipe, up to the limit on bytes; a file's size is checked before it is read.

    `~` is the home folder, unless there is a file of that name. Raises BadImage when there is no such file, or it is a
    folder, a device, unreadable, or a pipe that nobody writes to; ImageTooLarge.
    """
    if os.fspath(path).startswith("~") and not os.path.lexists(path):
        path = expand(os.fspath(path))
    name = show(path)
    try:
        # Without waiting: opening a pipe that nobody writes to would block for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            info = os.fstat(file.fileno())
            if stat.S_ISFIFO(info.st_mode):
                _wait_for_writer(file.fileno(), name)
            elif stat.S_ISREG(info.st_mode):
                check_bytes(info.st_size, name, settings)
            else:
                raise BadImage(f"{name} is a device, not a file; give an image file.")
            data = read_stream(file, settings.max_bytes + 1)
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


def read_stream(file: BinaryIO, most: int) -> bytes:
    """At most so many bytes. `file.read(most)` would take the memory for all of them at once."""
    pieces: list[bytes] = []
    while most > 0 and (piece := file.read(min(most, _PIECE))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def _wait_for_writer(descriptor: int, name: str) -> None:
    """Wait until a pipe has a writer; reading blocks from then on. Raises BadImage when nobody comes in time."""
    if not select.select([descriptor], [], [], _PIPE_SECONDS)[0]:
        with contextlib.suppress(BlockingIOError):  # somebody has opened it, and may take their time
            os.read(descriptor, 1)
            raise BadImage(f"{name} is a pipe that nobody writes to, not a regular file; give an image file.")
    os.set_blocking(descriptor, True)


def read_data_url(url: str, settings: ImageSettings) -> bytes:
    """Read the bytes in a `data:` address (RFC 2397), base64 or percent-encoded; its media type is ignored.

    Padding may be missing and there may be spaces, as browsers allow, and the alphabet for addresses is read, too
    (RFC 4648). Raises BadImage, ImageTooLarge.
    """
    name = "The data: address"
    head, comma, body = url[len("data:") :].partition(",")
    if not comma:
        raise BadImage(f"{name} has no comma, so no contents; write data:image/png;base64,… instead.")
    # Percent signs can shrink it by a factor of three, base64 by a factor of four thirds.
    check_bytes(max(1, len(body) // 4 - 1024), name, settings)
    data = unquote_to_bytes(body.encode("utf-8", "replace"))
    if head.rstrip().lower().endswith(";base64"):
        packed = b"".join(data.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        try:
            data = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
        except binascii.Error:
            raise BadImage(f"{name} holds damaged base64; encode the image's bytes again.") from None
    check_bytes(len(data), name, settings)
    return data
