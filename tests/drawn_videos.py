"""Small videos of a drawn scene: a red disc that moves, and a bar whose length is the number of the frame."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import av
from PIL import Image, ImageDraw

BAR = 4
"""Pixels of the bar for each frame."""


def scene(number: int, width: int = 160, height: int = 120) -> Image.Image:
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    left = 10 + 4 * number % (width - 40)
    draw.ellipse((left, height // 2, left + 30, height // 2 + 30), fill="red")
    draw.rectangle((0, 0, BAR * number + 1, 15), fill="blue")
    return picture


def bar(rgb: Any, width: int) -> int:
    """The number of the frame whose bar this is."""
    row = bytes(rgb[width * 4 * 3 : width * 5 * 3])
    count = sum(blue > red + 100 for red, blue in zip(row[::3], row[2::3], strict=True))
    return round((count - 2) / BAR)


def video(
    kind: str = "mp4",
    codec: str = "mpeg4",
    *,
    frames: int = 30,
    rate: int = 10,
    size: tuple[int, int] = (160, 120),
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    sound: bool = False,
    path: str | None = None,
    draw: Callable[..., Image.Image] = scene,
    change: Callable[[Any], object] = lambda _: None,
) -> bytes:
    """The bytes of a video; `change` gets its stream before a frame is written."""
    out: Any = path or io.BytesIO()
    with av.open(out, "w", format=kind, options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        heard: Any = file.add_stream("aac", rate=8000) if sound else None
        change(stream)
        file.start_encoding()
        for number in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_image(draw(number, *size))))
        file.mux(stream.encode())
        if heard is not None:
            _silence(file, heard)
    if path is not None:
        with open(path, "rb") as written:  # noqa: PTH123
            return written.read()
    return bytes(out.getvalue())


def audio() -> bytes:
    """The bytes of an MP4 file with sound alone."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        _silence(file, file.add_stream("aac", rate=8000))
    return out.getvalue()


def _silence(file: Any, stream: Any) -> None:
    for number in range(4):
        silent = av.AudioFrame(format="fltp", layout=stream.layout.name, samples=1024)
        silent.sample_rate, silent.pts = 8000, 1024 * number
        for plane in silent.planes:
            plane.update(bytes(plane.buffer_size))
        file.mux(stream.encode(silent))
    file.mux(stream.encode())
