"""How images come in: `data:` always; from the web and from a folder only where the settings allow it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from opsin.core.errors import BadImage, FetchFailed, ImageTooLarge, OpsinError, QueueFull
from opsin.core.request import Image
from opsin.core.settings import ImageSettings, ServerSettings
from opsin.images.fetch import Resolver, fetch
from opsin.server import decoder
from opsin.server.sources import INSTEAD, AddressPolicy, ImageFolder
from opsin.worker import Pixels, signal_name, start_process

T = TypeVar("T")

_FETCHES = 16
MAX_ADDRESS = 8_192
"""Characters of an image's address. `data:` addresses are bounded by the size of the body."""
DECODE_SECONDS = 60.0
"""What one file may take."""
_START = "import sys; sys.path[:] = filter(None, sys.path); from opsin.server.decoder import main; main()"


class FairQueue:
    """Room for so many of something; who must wait stands in the line of its key, and keys take turns.

    At most `longest` wait. If there are more, the newest request of the key with the most waiting is refused, so that
    a key that asks for much takes no place from a key that asks for little. Used on one event loop.
    """

    def __init__(self, room: int, longest: float = math.inf) -> None:
        self._room = room
        self._longest = longest
        self._used = 0
        self._lines: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    @property
    def waiting(self) -> int:
        """How many wait here."""
        return sum(map(self._length, self._lines))

    async def take(self, key: str, n: int) -> None:
        """Wait for room for `n`, to be given back with `leave`. Raises QueueFull."""
        waiter = n, asyncio.get_running_loop().create_future()
        granted = waiter[1]
        self._lines.setdefault(key, deque()).append(waiter)
        self._serve()
        if self.waiting > self._longest:
            longest = max(self._lines, key=lambda one: (self._length(one), one == key))
            refused = self._lines[longest][-1]
            self._drop(longest, refused)
            if not refused[1].done():
                refused[1].set_exception(QueueFull("Too many requests wait already: try again in a moment."))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._drop(key, waiter)
                self._serve()
            elif granted.exception() is None:
                self.leave(n)
            raise

    def leave(self, n: int) -> None:
        """Give room for `n` back."""
        self._used -= n
        self._serve()

    def _length(self, key: str) -> int:
        return sum(n for n, _ in self._lines[key])

    def _drop(self, key: str, waiter: tuple[int, asyncio.Future[None]]) -> None:
        line = self._lines.get(key, deque())
        if waiter in line:
            line.remove(waiter)
        if not line:
            self._lines.pop(key, None)

    def _serve(self) -> None:
        """Grant room to the keys in turn, as long as it suffices for the key whose turn it is."""
        while self._lines:
            key, line = next(iter(self._lines.items()))
            n, granted = line[0]
            # A request for more than the whole room runs alone.
            if self._used and self._used + n > self._room:
                return
            del self._lines[key]
            line.popleft()
            if line:
                self._lines[key] = line  # at the end of the turn order
            if not granted.done():  # it is done if its request was cancelled just now
                self._used += n
                granted.set_result(None)


class Wanted(NamedTuple):
    """An image of a request: its address, `low` to have it shrunk to 512 pixels, and the field that names it."""

    url: str
    detail: str | None = None
    param: str | None = None


class ImageLoader:
    """Turns the addresses in requests into checked images, within the limits of the settings.

    Threads of its own decode, and no more pixels are held at the same time than `max_pixels_in_flight`.
    `resolve` replaces the policy on addresses, for tests; `pool` are the processes that decode (default: this one).
    Raises BadParameter when the settings name hosts or a folder that cannot be.
    """

    def __init__(
        self, settings: ServerSettings, *, resolve: Resolver | None = None, pool: DecoderPool | None = None
    ) -> None:
        self.limits = ImageSettings(
            max_bytes=settings.max_image_bytes, max_pixels=settings.max_pixels, fetch=settings.fetch_images
        )
        self.max_pixels = settings.max_pixels_in_flight
        self.room = FairQueue(self.max_pixels)
        self._pool = pool
        self._resolve = resolve or AddressPolicy(settings.image_hosts)
        self._folder = None if settings.media_path is None else ImageFolder(settings.media_path)
        self._fetching = FairQueue(_FETCHES)
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "opsin-decode")

    def close(self) -> None:
        """Let the threads and processes go once they have nothing to do."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()

    async def call(self, work: str, *request: Any) -> Any:
        """What the function `work` of `opsin.server.decoder` returns. Raises BadImage and its kinds."""
        return await _in(self._decoders, self._pool.call if self._pool else _here, work, *request)

    async def file(self, url: str, key: str) -> bytes | str:
        """The bytes of the file; a `data:` address is left to the decoder. Raises FetchFailed and ImageTooLarge.

        Fetches wait for each other, and keys take turns.
        """
        scheme, colon, _ = url[:20].partition(":")
        kind = scheme.strip().lower() if colon else ""
        if kind == "data":
            return url.lstrip()
        if len(url) > MAX_ADDRESS:
            raise FetchFailed(f"The address of the image has more than {MAX_ADDRESS:,} characters: {INSTEAD[3:]}")
        if kind == "file":
            if self._folder is None:
                raise FetchFailed(
                    f"file: addresses are not read here: start the server with --media-path FOLDER, {INSTEAD}"
                )
            return await _in(self._decoders, self._folder.read, url, self.limits)
        if kind not in {"http", "https"}:
            raise FetchFailed(
                "The address of an image starts with data:, or with http:// or https:// where fetching is switched on: "
                "give one like that."
            )
        if not self.limits.fetch:
            raise FetchFailed(
                f"Images are not fetched from addresses here: start the server with --fetch-images, {INSTEAD}"
            )
        await self._fetching.take(key, 1)
        try:
            return await fetch(url, self.limits, self._resolve)
        finally:
            self._fetching.leave(1)


class RequestImages:
    """Loads the images of one request of `key`, and holds their pixels until it is closed."""

    def __init__(self, loader: ImageLoader, key: str) -> None:
        self._loader = loader
        self._key = key
        self._pixels = 0

    async def load(self, wanted: Sequence[Wanted]) -> list[Image]:
        """The images, loaded side by side. Waits until there is room for the pixels of all; call it once.

        Raises BadImage, ImageTooLarge, ImageUnsupported and FetchFailed; `param` names the field then.
        """
        if not wanted:
            return []
        files = await _all(self._open(one) for one in wanted)
        pixels = sum(pixels for pixels, _, _ in files)
        if pixels > self._loader.max_pixels:
            raise ImageTooLarge(
                f"The images of this request have more than {self._loader.max_pixels:,} pixels together; "
                "send fewer, or scale them down first."
            )
        await self._loader.room.take(self._key, pixels)
        self._pixels = pixels
        images = await _all(self._decode(one, *found) for one, found in zip(wanted, files, strict=True))
        self._keep(sum(image.width * image.height for image in images))
        return images

    def close(self) -> None:
        """Give all pixels back."""
        self._keep(0)

    def _keep(self, pixels: int) -> None:
        self._loader.room.leave(self._pixels - pixels)
        self._pixels = pixels

    async def _open(self, one: Wanted) -> tuple[int, bytes | str, float]:
        """How many pixels it has, its file, and the milliseconds that it took to get these."""
        begin = time.perf_counter()
        with _about(one):
            file = await self._loader.file(one.url, self._key)
            pixels, data = await self._loader.call("measure", file, self._loader.limits)
            return pixels, data or file, (time.perf_counter() - begin) * 1e3

    async def _decode(self, one: Wanted, _: int, file: bytes | str, fetch_ms: float) -> Image:
        with _about(one):
            image: Image = await self._loader.call("decode", file, self._loader.limits, one.detail)
            return dataclasses.replace(image, fetch_ms=fetch_ms)


@contextlib.contextmanager
def _about(one: Wanted) -> Iterator[None]:
    """The client wants to know which of its images it was."""
    try:
        yield
    except OpsinError as error:
        error.param = one.param  # type: ignore[attr-defined]
        raise


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do it all side by side; the first failure ends the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _in(threads: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work, *args)


def _here(work: str, *request: Any) -> Any:
    return getattr(decoder, work)(*request)


class DecoderPool:
    """Decodes in other processes, one for each thread that calls at the same time; they stay for the next file.

    A file may take `seconds`.
    """

    def __init__(self, seconds: float = DECODE_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._idle: list[_Process] = []

    def call(self, *request: Any) -> Any:
        """What `measure` or `decode`, called with the rest of the request, returns. Raises BadImage and its kinds."""
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or _Process()
        result, *files = process.call(request, self._seconds)  # one that crashed or was killed is left out from now on
        with self._lock:
            self._idle.append(process)
        if isinstance(result, OpsinError):
            raise result
        if files:  # the pixels came apart
            return dataclasses.replace(result, rgb=Pixels(files[0], result.width * result.height * 3))
        return result

    def close(self) -> None:
        """End the processes that are idle; busy ones end with this process."""
        while self._idle:
            self._idle.pop().end()


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
