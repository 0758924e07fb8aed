"""Decoding one image file, usually in a process of its own: a file that crashes it, or keeps it, harms nobody else.

What comes as a `data:` address is measured as such, and decoded as the bytes it holds. What a command or a program
names as images is loaded here, too: videos and documents are read in a process that can be ended.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opsin import images
from opsin.core.errors import BadImage, BadParameter, OpsinError
from opsin.core.image_options import ANY_SIZES, ImageOptions, ImageSizes
from opsin.core.request import Image
from opsin.core.settings import ImageSettings, VideoSettings
from opsin.images.decode import read_source
from opsin.images.video import as_frames, is_video, read_video
from opsin.worker.messages import ENDING, Channel, Pixels, portable, share, signal_name, start_process, take_pixels

Sizes = Callable[[], ImageSizes]
DECODE_SECONDS, VIDEO_SECONDS = 60.0, 120.0
"""What one file may take, and what one video may; in a server as long as an image."""
DOCUMENT_BYTES = 2 * 2**30  # that drawing a document may take, beside what its process has already
_DRAWING = threading.Lock()
_START = "import sys; sys.path[:] = filter(None, sys.path); from opsin.worker.decoders import main; main()"


def measure(file: bytes | str, limits: ImageSettings, *how: Any) -> tuple[int, int, bytes | None]:
    """Pixels and pages that are read of the file, by its head, and what its `data:` address holds. Raises BadImage."""
    data = images.read_data_url(file, limits) if isinstance(file, str) else file
    with _bounded_memory(data):
        opened = images.OpenPages(data, limits, *how)
    return opened.pixels, opened.count, data if isinstance(file, str) else None


def decode(data: bytes, limits: ImageSettings, options: ImageOptions, sizes: ImageSizes, name: str = "") -> list[Image]:
    """What the model gets of an image or of pages, in memory that a worker can map. Raises BadImage, BadParameter."""
    with _bounded_memory(data):
        found = images.OpenPages(data, limits, options, sizes, name).load()
    return [dataclasses.replace(one, rgb=share(one.rgb)) for one in found]


def decode_video(
    source: object, limits: ImageSettings, video: VideoSettings, options: ImageOptions, sizes: ImageSizes
) -> list[Image]:
    """The frames of a video, in memory that a worker can map. Raises BadImage and its kinds, and FetchFailed."""
    frames = [images.load_image(one, limits, options, sizes) for one in read_video(source, limits, video)]
    return [dataclasses.replace(image, rgb=share(image.rgb)) for image in frames]


@contextlib.contextmanager
def _bounded_memory(data: bytes) -> Iterator[None]:
    """Let PDFium end this process rather than the machine's memory, on Linux. It serves one thread at a time."""
    if not images.is_pdf(data) or not sys.platform.startswith("linux"):
        yield
        return
    import resource

    with _DRAWING:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        most = (one for one in (soft, held + DOCUMENT_BYTES) if one != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (min(most), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


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
            found: list[Image] = result if isinstance(result, list) else []
            channel.send((result,), *[one.rgb.fd for one in found if isinstance(one.rgb, Pixels)])
            del request, result, found
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
        if files:  # the pixels of large images came apart
            take_pixels(result, files)
        return result

    def close(self) -> None:
        """End the processes that are idle; busy ones end with this process."""
        while self._idle:
            _end(*self._idle.pop())


def _end(process: subprocess.Popen[bytes], channel: Channel) -> int:
    """End a decoder; its exit code."""
    process.kill()  # one that a signal has ended keeps its exit code
    channel.close()
    return process.wait()


def load_source(
    source: object, limits: ImageSettings, video: VideoSettings, options: ImageOptions, sizes: Sizes, *, frames: bool
) -> list[Image]:
    """The frames of a video, an image and its tiles, or pages; with `frames` also those of an animation (GIF, APNG).

    `sizes` is asked for documents that can be read. Raises BadImage and its kinds, FetchFailed, BadParameter.
    """
    is_one = is_video(source, animations=frames)
    if options.tiles and (frames or is_one):
        raise BadParameter("Tiles are for images, not for the frames of a video: leave them out.")
    if is_one and limits.pages:
        raise BadParameter("Pages are those of documents, and this is a video: leave them out.")
    if is_one:
        with contextlib.closing(DecoderPool(VIDEO_SECONDS)) as pool:
            return list(pool.call(decode_video, source, limits, video, options.split()[0], ANY_SIZES))
    begin = time.perf_counter()
    name, found = read_source(source, limits)
    if limits.pages and not isinstance(found, bytes):
        raise BadParameter("Pages are those of files: leave them out for an image that is open already.")
    fetch_ms = (time.perf_counter() - begin) * 1e3
    if isinstance(found, bytes) and (limits.pages or images.is_pdf(found)):
        with contextlib.closing(DecoderPool()) as pool:
            pool.call(measure, found, limits, options, ANY_SIZES, name)
            loaded: list[Image] = pool.call(decode, found, limits, options, sizes(), name)
    else:
        loaded = images.load_images(found, limits, options.split()[0], name=name)
    return [dataclasses.replace(loaded[0], fetch_ms=fetch_ms), *loaded[1:]] if isinstance(found, bytes) else loaded


def join(groups: Iterable[Sequence[Image]], *, frames: bool = False, **video: Any) -> list[Image]:
    """The images of several sources; as `frames` they are one video, of which some are taken if there are too many."""
    every = [image for group in groups for image in group]
    return as_frames(every, video.get("max_frames")) if frames else every


def check_videos(sources: Sequence[object], *, frames: bool = False, **video: Any) -> None:
    """Raise BadParameter if somebody made a setting of videos, and no source is one ("-" may be)."""
    without_effect = sorted(video.keys() - ({"max_frames"} if frames else set()))
    if without_effect and not any(
        (isinstance(one, str) and one == "-") or is_video(one, animations=frames) for one in sources
    ):
        raise BadParameter(f"{without_effect[0]} is for videos, and there is none: leave it out, or give a video.")
