"""Decoding images in processes of their own: a file that crashes a decoder, or keeps it for ever, harms nobody else."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

from opsin.core.errors import BadImage, OpsinError
from opsin.core.image import Image
from opsin.core.settings import ImageSettings
from opsin.worker import Channel, Pixels, portable, share, signal_name, start_process

LOW_EDGE = 512
"""Pixels of the longer edge that `detail: low` shrinks an image to."""
DECODE_SECONDS = 60.0
"""What one file may take."""
_START = "import sys; sys.path[:] = filter(None, sys.path); from opsin.server.decoder import main; main()"


class Decoder:
    """Decodes in the calling thread; for tests, and inside the processes of `DecoderPool`."""

    def measure(self, data: bytes, limits: ImageSettings) -> int:
        """How many pixels the file has, from its head alone. Raises BadImage and its kinds."""
        from opsin.images import OpenImage

        file = OpenImage(data, limits)
        return file.width * file.height

    def decode(self, data: bytes, limits: ImageSettings, detail: str | None) -> Image:
        """The image, in memory that a worker can map, shrunk when `detail` is low. Raises BadImage and its kinds."""
        from opsin.images import load_image

        image = load_image(data, limits, LOW_EDGE if detail == "low" else None)
        return dataclasses.replace(image, rgb=share(image.rgb))

    def close(self) -> None:
        """Nothing to free."""


class DecoderPool(Decoder):
    """Decodes in other processes, one for each thread that calls at the same time; they stay for the next file.

    A file may take `seconds`.
    """

    def __init__(self, seconds: float = DECODE_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._idle: list[_Process] = []

    def measure(self, data: bytes, limits: ImageSettings) -> int:
        """See Decoder."""
        pixels: int = self._call("measure", data, limits)[0]
        return pixels

    def decode(self, data: bytes, limits: ImageSettings, detail: str | None) -> Image:
        """See Decoder."""
        image, *files = self._call("decode", data, limits, detail)
        decoded: Image = image
        return dataclasses.replace(decoded, rgb=Pixels(files[0], image.width * image.height * 3)) if files else decoded

    def close(self) -> None:
        """End the processes that are idle; busy ones end with this process."""
        while self._idle:
            self._idle.pop().end()

    def _call(self, *request: Any) -> tuple[Any, ...]:
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or _Process()
        result = process.call(request, self._seconds)  # one that crashed or was killed is left out from now on
        with self._lock:
            self._idle.append(process)
        if isinstance(result[0], OpsinError):
            raise result[0]
        return result


class _Process:
    def __init__(self) -> None:
        self._process, self._channel = start_process([sys.executable, "-c", _START])

    def call(self, request: tuple[Any, ...], seconds: float) -> tuple[Any, ...]:
        """The result, which may be an error; with an open file where there is an image. Raises BadImage."""
        try:
            self._channel.send(request)
            result = self._channel.receive(seconds)
        except (EOFError, OSError):
            raise BadImage(
                f"The image made its decoder crash ({signal_name(self.end())}): the file is damaged, save it again."
            ) from None
        if result is None:
            self.end()
            raise BadImage(f"The image took longer than {seconds:.0f} s to decode: save it in another way.")
        return result

    def end(self) -> int:
        """End it; the exit code."""
        self._channel.close()
        try:
            return self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def main() -> None:
    """A decoder process: answers one request after another until the front is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel, decoder = Channel(socket.socket(fileno=int(sys.argv[1]))), Decoder()
    while True:
        try:
            request = channel.receive()
            assert request is not None
            try:
                result = getattr(decoder, request[0])(*request[1:])
            except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
                result = portable(error)
            pixels = result.rgb if isinstance(result, Image) else None
            channel.send((result,), *[pixels.fd] if isinstance(pixels, Pixels) else ())
            del request, result, pixels
        except (EOFError, OSError):
            os._exit(0)
