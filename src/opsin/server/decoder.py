"""Decoding one image file, usually in a process of its own: a file that crashes it, or keeps it, harms nobody else.

What comes as a `data:` address is measured as such, and decoded as the bytes it holds.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys

from opsin import images
from opsin.core.request import Image
from opsin.core.settings import ImageSettings
from opsin.worker import ENDING, Channel, Pixels, portable, share


def measure(file: bytes | str, limits: ImageSettings) -> tuple[int, bytes | None]:
    """How many pixels the file has, from its head alone, and what its `data:` address holds. Raises BadImage."""
    data = images.read_data_url(file, limits) if isinstance(file, str) else file
    opened = images.OpenImage(data, limits)
    return opened.width * opened.height, data if isinstance(file, str) else None


def decode(data: bytes, limits: ImageSettings, detail: str | None, seen_edge: int = 0) -> Image:
    """The image, in memory that a worker can map; shrunk to 512 pixels an edge if `detail` is low.

    `seen_edge` is how many of them the model sees (0: not known). Raises BadImage.
    """
    image = images.load_image(data, limits, 512 if detail == "low" else None, seen_edge=seen_edge)
    return dataclasses.replace(image, rgb=share(image.rgb))


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
            pixels = result.rgb if isinstance(result, Image) else None
            channel.send((result,), *[pixels.fd] if isinstance(pixels, Pixels) else ())
            del request, result, pixels
        except (EOFError, OSError):
            os._exit(0)
