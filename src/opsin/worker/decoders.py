"""Decoding one image file, usually in a process of its own: a file that crashes it, or keeps it, harms nobody else.

What comes as a `data:` address is measured as such, and decoded as the bytes it holds.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from typing import Any

from opsin import images
from opsin.core.errors import BadImage, OpsinError
from opsin.core.image_options import ImageOptions, ImageSizes
from opsin.core.request import Image
from opsin.core.settings import ImageSettings, VideoSettings
from opsin.images.video import read_video
from opsin.worker.messages import ENDING, Channel, Pixels, portable, share, signal_name, start_process

DECODE_SECONDS = 60.0
"""What one file may take."""
_START = "import sys; sys.path[:] = filter(None, sys.path); from opsin.worker.decoders import main; main()"


def measure(file: bytes | str, limits: ImageSettings) -> tuple[int, bytes | None]:
    """How many pixels the file has, from its head alone, and what its `data:` address holds. Raises BadImage."""
    data = images.read_data_url(file, limits) if isinstance(file, str) else file
    opened = images.OpenImage(data, limits)
    return opened.width * opened.height, data if isinstance(file, str) else None


def decode(data: bytes, limits: ImageSettings, options: ImageOptions, sizes: ImageSizes) -> list[Image]:
    """What `load_images` makes of it, in memory that a worker can map. Raises BadImage and BadParameter."""
    return [dataclasses.replace(one, rgb=share(one.rgb)) for one in images.load_images(data, limits, options, sizes)]


def decode_video(
    source: object, limits: ImageSettings, video: VideoSettings, options: ImageOptions, sizes: ImageSizes
) -> list[Image]:
    """The frames of a video, in memory that a worker can map. Raises BadImage and its kinds, and FetchFailed."""
    frames = [images.load_image(one, limits, options, sizes) for one in read_video(source, limits, video)]
    return [dataclasses.replace(image, rgb=share(image.rgb)) for image in frames]


def main() -> None:
    """A decoder process: answers one request after another until the front is gone."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    while True:
        try:
            request = channel.receive()
            assert request is not None
            try:
                result = request[0](*request[1:])
            except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
                result = portable(error)
            found = result if isinstance(result, list) else [result]
            pixels = [image.rgb for image in found if isinstance(image, Image)]
            channel.send((result,), *[one.fd for one in pixels if isinstance(one, Pixels)])
            del request, result, found, pixels
        except (EOFError, OSError):
            os._exit(0)


class DecoderPool:
    """Decodes in other processes, one for each thread that calls at the same time; they stay for the next file.

    The first is started at once, so that it is there when the first file comes.
    """

    def __init__(self, seconds: float = DECODE_SECONDS) -> None:
        self._seconds = seconds
        self._idle = [start_process([sys.executable, "-c", _START])]

    def call(self, *request: Any) -> Any:
        """What the first of the request, a function, returns for the rest. Raises BadImage and its kinds."""
        try:
            process, channel = self._idle.pop()  # a list has a lock of its own
        except IndexError:
            process, channel = start_process([sys.executable, "-c", _START])
        # One that crashed or was killed is left out from now on.
        try:
            channel.send(request)
            answer = channel.receive(self._seconds)
        except (EOFError, OSError):
            raise BadImage(
                f"The file made its decoder crash ({signal_name(_end(process, channel))}): it is damaged, save it "
                "again."
            ) from None
        except BaseException:  # Ctrl-C: nobody waits for it any more
            _end(process, channel)
            raise
        if answer is None:
            _end(process, channel)
            raise BadImage(f"The file took longer than {self._seconds:.0f} s to decode: save it in another way.")
        self._idle.append((process, channel))
        result, *files = answer
        if isinstance(result, OpsinError):
            raise result
        if not files:
            return result
        # The pixels of large images came apart.
        apart = iter(files)
        images = [
            image if image.rgb else dataclasses.replace(image, rgb=Pixels(next(apart), image.width * image.height * 3))
            for image in (result if isinstance(result, list) else [result])
        ]
        return images if isinstance(result, list) else images[0]

    def close(self) -> None:
        """End the processes that are idle; busy ones end with this process."""
        while self._idle:
            _end(*self._idle.pop())


def _end(process: subprocess.Popen[bytes], channel: Channel) -> int:
    """End a decoder; its exit code."""
    process.kill()  # one that a signal has ended keeps its exit code
    channel.close()
    return process.wait()
