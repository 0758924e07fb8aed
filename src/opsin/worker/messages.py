"""What front and worker send each other: pickled tuples over a local socket, and pixels in memory that both can map.

Front to worker: `open` (settings), `pixels` (a large image of the request that follows), `submit`, `cancel`, `ping`,
`close`. Worker to front: `loading`, `warming`, `ready`, `failed`, `events` (everything that happened since
the last message, usually one engine step), `images` (those in native code now), `pong`.

The worker is our own child, which makes unpickling what it sends as safe as running it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import pickle
import select
import socket
import struct
import tempfile
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Self

from opsin.core.answer import Event, TextDelta
from opsin.core.backend import BackendLimits
from opsin.core.errors import EngineError, OpsinError, copy_of
from opsin.core.model_info import ModelInfo
from opsin.core.placement import Placement
from opsin.core.request import Image, ImagePart, Prompt
from opsin.prompt import TemplateSource

_HEAD = struct.Struct("<QB")
_READ = 1 << 18
SHARED_BYTES = 4 * 2**20
"""Images from this size on are shared: smaller ones are copied faster, and each shared one takes open files."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the front needs to know of a model that a worker has loaded.

    `source` is what prompts are written with, `setup` names files, settings and machine in one word, `placement` was
    measured in the warm-up, `notice` is a sentence for whoever started the worker.
    """

    info: ModelInfo
    limits: BackendLimits
    source: TemplateSource
    is_demo: bool
    setup: str
    load_ms: float
    placement: Placement
    notice: str | None = None


class Pixels(mmap.mmap):
    """The RGB bytes of one image in memory without a name; freed when the last process has dropped its reference."""

    fd: int

    def __new__(cls, fd: int, size: int) -> Self:
        """Map what is behind the file descriptor, which belongs to this object from now on."""
        made = super().__new__(cls, fd, size)
        made.fd = fd
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without the pixels: these go their own way."""
        return bytes, ()

    def __del__(self) -> None:
        os.close(self.fd)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("opsin-pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def share(rgb: bytes | mmap.mmap) -> bytes | mmap.mmap:
    """The pixels where a worker can map them, if there are many."""
    if isinstance(rgb, Pixels) or len(rgb) < SHARED_BYTES:
        return rgb
    fd, left = _nameless_file(), memoryview(rgb)
    try:
        while left:
            left = left[os.write(fd, left) :]
        return Pixels(fd, len(rgb))
    except BaseException:
        os.close(fd)
        raise


def share_all(prompt: Prompt) -> Prompt:
    """The prompt with the pixels of all large images where a worker can map them."""
    parts = [
        ImagePart(dataclasses.replace(part.image, rgb=share(part.image.rgb))) if isinstance(part, ImagePart) else part
        for part in prompt.parts
    ]
    return dataclasses.replace(prompt, parts=tuple(parts))


def set_pixels(image: Image, rgb: Pixels | bytes) -> None:
    """Give an image its pixels, or, with empty bytes, let these go while the image is still in use."""
    object.__setattr__(image, "rgb", rgb)


class Channel:
    """One end of the connection. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._files: deque[int] = deque()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, message: tuple[Any, ...], fd: int | None = None) -> None:
        """Send a message, and with it an open file. Waits while the other side does not read. Raises OSError."""
        body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        data = _HEAD.pack(len(body), fd is not None) + body
        with self._sending:
            sent = 0 if fd is None else socket.send_fds(self._sock, [data], [fd])
            self._sock.sendall(data[sent:] if sent else data)

    def receive(self, seconds: float | None = None) -> tuple[Any, ...] | None:
        """The next message, an open file that came with it as its last element; None when none came in time.

        Raises EOFError when the other side is gone.
        """
        while (message := self._next()) is None:
            if not self._poll.poll(None if seconds is None else seconds * 1e3):
                return None
            try:
                data, files, _, _ = socket.recv_fds(self._sock, _READ, 8)
            except ConnectionError as error:
                raise EOFError from error
            if not data:
                raise EOFError
            self._buffer += data
            self._files.extend(files)
        return message

    def close(self) -> None:
        """Close this end, and files that were received and never taken."""
        self._sock.close()
        while self._files:
            os.close(self._files.popleft())

    def _next(self) -> tuple[Any, ...] | None:
        if len(self._buffer) < _HEAD.size:
            return None
        length, has_file = _HEAD.unpack_from(self._buffer)
        end = _HEAD.size + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer)[_HEAD.size : end] as body:
            message: tuple[Any, ...] = pickle.loads(body)  # noqa: S301 - see the module
        del self._buffer[:end]
        return (*message, self._files.popleft()) if has_file else message


# A delta is by far the most frequent event, and a dataclass is slow to pickle: its text goes as a plain tuple.
Packed = tuple[int, str] | tuple[int, Event | BaseException]


def pack(number: int, event: Event | BaseException) -> Packed:
    """An event of the request with this number, small."""
    if isinstance(event, TextDelta) and not event.reasoning and not event.logprobs:
        return number, event.text
    return number, portable(event) if isinstance(event, BaseException) else event


def portable(error: BaseException) -> OpsinError:
    """An error that can be pickled and raised again on the other side."""
    if isinstance(error, OpsinError):
        with contextlib.suppress(Exception):
            return copy_of(error)
    return EngineError(f"The engine failed on this request ({type(error).__name__}: {error}).")
