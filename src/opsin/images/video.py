"""Frames of a video through PyAV (FFmpeg): which ones, and how large. Runs where it can be ended: see `worker`.

FFmpeg gets the bytes with the one demuxer that `sniff` has named, so no playlist leads it to other files.
"""

import dataclasses
import io
import os
import re
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from opsin.core.errors import BadImage, ImageTooLarge, ImageUnsupported, OpsinError
from opsin.core.files import expand
from opsin.core.image_options import ANY_SIZES, AS_IT_IS
from opsin.core.request import Image
from opsin.core.settings import ImageSettings, VideoSettings
from opsin.images.decode import make_images, read_source
from opsin.images.sniff import image_format, video_format
from opsin.images.source import check_size, damaged

_ADDRESS = re.compile(r"(?i)data:video/|https?://[^?#]*\.(mp4|m4v|mov|webm|mkv|avi)([?#]|\Z)")
_MAX_PIXELS = 36_000_000  # of a frame as it is decoded (8K): a decoder may hold 16 and more of them
_MAX_PACKETS = 2_000_000
PIXELS = 6_000_000
"""Of all frames of a video together: fits 8,192 tokens where a model keeps sizes."""


def is_video(source: object, *, animations: bool = False) -> bool:
    """Whether a source is a video: by a file's first bytes, by the media type or the ending of an address."""
    head = bytes(source[:4096]) if isinstance(source, bytes | bytearray | memoryview) else b""
    if isinstance(source, str | os.PathLike):
        if _ADDRESS.match(os.fspath(source)):
            return True
        try:
            path = expand(os.fspath(source))
            if path.is_file():  # no pipe: what is read of one is gone
                with path.open("rb") as file:
                    head = file.read(4096)
        except (OSError, ValueError):
            return False  # whoever reads it says why
    return video_format(head, animations=animations) is not None


def read_video(source: object, limits: ImageSettings, video: VideoSettings) -> list[Image]:
    """The chosen frames of a path, bytes or an address, upright and opaque, in order, numbered from 0.

    They are shrunk to 6 megapixels together; the first one's notes say which they are. Raises BadImage,
    ImageTooLarge, ImageUnsupported, FetchFailed.
    """
    begin = time.perf_counter()
    name, data = read_source(source, limits.model_copy(update={"max_bytes": video.max_bytes}))
    fetched = time.perf_counter()
    demuxer = video_format(data, animations=True)
    if demuxer is None:
        raise ImageUnsupported(f"{name} is no video ({image_format(data, name)}): give it as an image.")
    try:
        import av
    except ImportError:
        raise ImageUnsupported(f"{name} is a video, which needs PyAV: pip install 'opsin[video]'.") from None
    try:
        with av.open(io.BytesIO(data), format=demuxer, metadata_errors="ignore") as container:
            images = _Frames(container, name, limits, video).read()
    except OpsinError:
        raise
    except Exception as error:  # FFmpeg's are of many classes
        raise damaged("video", name) from error
    fetch_ms, decode_ms = (fetched - begin) * 1e3, (time.perf_counter() - fetched) * 1e3
    return [dataclasses.replace(images[0], fetch_ms=fetch_ms, decode_ms=decode_ms), *images[1:]]


def as_frames(images: Sequence[Image], most: int | None = None) -> list[Image]:
    """The images as frames of one video; of more than `most` some are taken, evenly."""
    chosen = [images[at] for at in spread(len(images), most or len(images))]
    if len(chosen) < len(images):
        note = f"{len(chosen):,} of {len(images):,} frames, evenly spread"
        chosen[0] = dataclasses.replace(chosen[0], notes=(note, *chosen[0].notes))
    return [dataclasses.replace(image, frame=number) for number, image in enumerate(chosen)]


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly, with the first and the last."""
    return [round(at * (count - 1) / max(1, most - 1)) for at in range(most)] if most < count else list(range(count))


class _Frames:
    """An open video, within limits. Raises BadImage, ImageTooLarge, ImageUnsupported, and what PyAV raises."""

    def __init__(self, container: Any, name: str, limits: ImageSettings, video: VideoSettings) -> None:
        self._container, self._name, self._video = container, name, video
        self._limits = limits.model_copy(update={"max_pixels": min(limits.max_pixels, _MAX_PIXELS)})
        # Covers of songs are streams of one still image.
        streams = [one for one in container.streams.video if not one.disposition & one.disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            raise ImageUnsupported(f"{name} has no video in it that can be decoded (sound is not read).")
        self._stream, codec = streams[0], streams[0].codec_context
        check_size(codec.width, codec.height, name, self._limits)
        codec.options = {"max_pixels": str(self._limits.max_pixels)}  # sizes may change on the way
        self._tick = float(self._stream.time_base)

    def read(self) -> list[Image]:
        """See `read_video`."""
        stamps, keys = self._packets()
        wanted = self._choose(stamps)
        images = list(self._decoded(wanted, keys))
        if not images:
            raise damaged("video", self._name)
        last, (width, height) = (wanted[-1] - stamps[0]) * self._tick, (images[0].width, images[0].height)
        which = f"{len(images):,} of {len(stamps):,} frames, up to {last:.1f} s, {width} by {height} pixels"
        notes = (which, *("its sound is not read" for _ in self._container.streams.audio[:1]), *images[0].notes)
        return as_frames([dataclasses.replace(images[0], notes=notes), *images[1:]])

    def _packets(self) -> tuple[list[int], list[int]]:
        """The times of all frames, and of those that need no other to be decoded; in order."""
        stamps, keys = list[int](), list[int]()
        for packet in self._container.demux(self._stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            if packet.is_corrupt:
                raise damaged("video", self._name)
            if packet.size and stamp is not None:
                stamps.append(stamp)
                keys += [stamp] * packet.is_keyframe
            if len(stamps) > _MAX_PACKETS:
                break
        if not stamps:
            raise BadImage(f"{self._name} has no frame in it, so it is empty or cut short; get a whole copy of it.")
        seconds, most = (max(stamps) - min(stamps)) * self._tick, self._video.max_seconds
        if seconds > most or len(stamps) > _MAX_PACKETS:
            raise ImageTooLarge(
                f"{self._name} has {len(stamps):,} or more frames in {seconds:,.0f} s, and at most {_MAX_PACKETS:,} in "
                f"{most:,.0f} s are read; cut a part out of it first."
            )
        return sorted(set(stamps)), sorted(keys) or [min(stamps)]

    def _choose(self, stamps: Sequence[int]) -> list[int]:
        """Those of the times that are read: so many a second, or fewer, evenly."""
        fps = self._video.fps * self._tick
        count = int((stamps[-1] - stamps[0]) * fps + 1e-6) + 1
        wanted = (stamps[0] + at / fps for at in spread(count, self._video.max_frames))
        return [stamps[at] for at in sorted({bisect_right(stamps, stamp + 0.5) - 1 for stamp in wanted})]

    def _decoded(self, wanted: Sequence[int], keys: Sequence[int]) -> Iterator[Image]:
        """The frames at these times. Nothing is decoded before the key frame that the next one needs."""
        at: int | None = None
        frames: Iterator[Any] = iter(())
        for want in wanted:
            key = keys[max(0, bisect_right(keys, want) - 1)]
            if at is None or key > at:
                self._container.seek(key, stream=self._stream)
                frames = self._container.decode(self._stream)
            for frame in frames:
                at = want if frame.pts is None else frame.pts
                if at >= want:
                    yield self._image(frame, len(wanted))
                    break

    def _image(self, frame: Any, count: int) -> Image:
        check_size(frame.width, frame.height, self._name, self._limits)
        if frame.is_corrupt:
            raise damaged("video", self._name)
        width, height = frame.width * float(self._stream.sample_aspect_ratio or 1), frame.height
        shrink = min(1.0, (PIXELS / count / (width * height)) ** 0.5)
        size = {"width": max(1, int(width * shrink)), "height": max(1, int(height * shrink))}
        upright = frame.to_image(**size, interpolation="AREA")
        if frame.rotation:
            upright = upright.rotate(frame.rotation, expand=True)
        about = Image(b"", upright.width, upright.height, "", "video")
        return make_images(upright, about, self._name, AS_IT_IS, ANY_SIZES)[0]
