"""Decoding one image file, usually in a process of its own: a file that crashes it, or keeps it, harms nobody else.

A file is its bytes, or its `data:` address.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
import time

from opsin.core.errors import BadImage
from opsin.core.image import Image
from opsin.core.settings import ImageSettings
from opsin.worker import Channel, Pixels, portable, share

LOW_EDGE = 512
"""Pixels of the longer edge that `detail: low` shrinks an image to."""


def measure(file: bytes | str, limits: ImageSettings) -> int:
    """How many pixels the file has, from its head alone. Raises BadImage and its kinds."""
    from opsin.images import OpenImage

    opened = OpenImage(_bytes(file, limits), limits)
    return opened.width * opened.height


def decode(file: bytes | str, limits: ImageSettings, detail: str | None) -> Image:
    """The image, in memory that a worker can map, shrunk when `detail` is low. Raises BadImage and its kinds."""
    from opsin.images import load_image

    began = time.perf_counter()
    image = load_image(_bytes(file, limits), limits, LOW_EDGE if detail == "low" else None)
    rgb = share(image.rgb)
    return dataclasses.replace(image, rgb=rgb, decode_ms=(time.perf_counter() - began) * 1e3)


def _bytes(file: bytes | str, limits: ImageSettings) -> bytes:
    from opsin.images import read_data_url

    try:
        return read_data_url(file, limits) if isinstance(file, str) else file
    except UnicodeEncodeError:
        raise BadImage("The data: address has characters that no address can: encode the image again.") from None


def main() -> None:
    """A decoder process: answers one request after another until the front is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    while True:
        try:
            request = channel.receive()
            assert request is not None
            try:
                result = globals()[request[0]](*request[1:])
            except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
                result = portable(error)
            pixels = result.rgb if isinstance(result, Image) else None
            channel.send((result,), pixels.fd if isinstance(pixels, Pixels) else None)
            del request, result, pixels
        except (EOFError, OSError):
            os._exit(0)
