"""How images come in: `data:` always; from the web and from a folder only where the settings allow it."""

import asyncio
import dataclasses
import math
import operator
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from opsin.core.errors import FetchFailed, ImageTooLarge, OpsinError, QueueFull
from opsin.core.image_options import ANY_SIZES, AS_IT_IS, ImageOptions, ImageSizes
from opsin.core.request import Image
from opsin.core.settings import ImageSettings, ServerSettings, VideoSettings
from opsin.images.fetch import INSTEAD, AddressPolicy, Resolver, fetch
from opsin.images.video import PIXELS
from opsin.server.folder import ImageFolder
from opsin.server.middleware import image_host
from opsin.worker import DecoderPool, decoders

T = TypeVar("T")

MAX_ADDRESS = 8_192
"""Characters of an image's address. `data:` addresses are bounded by the size of the body."""


class _Waiter(NamedTuple):
    key: str
    n: int
    granted: asyncio.Future[None]


class FairQueue:
    """Room for so many of something. Of those who wait, it is the turn of the key that was served longest ago.

    At most `longest` wait. If there are more, the newest request of the key with the most waiting is refused, so that
    a key that asks for much takes no place from a key that asks for little. Used on one event loop.
    """

    def __init__(self, room: int, longest: float = math.inf) -> None:
        self._room = room
        self._longest = longest
        self._used = self._turn = 0
        self._last_turn: dict[str, int] = {}
        self._line: list[_Waiter] = []

    @property
    def waiting(self) -> int:
        """How many wait here."""
        return sum(waiter.n for waiter in self._line)

    async def take(self, key: str, n: int) -> None:
        """Wait for room for `n`, to be given back with `leave`. Raises QueueFull."""
        waiter = _Waiter(key, n, asyncio.get_running_loop().create_future())
        self._line.append(waiter)
        self._serve()
        if self.waiting > self._longest:
            waiting: Counter[str] = Counter()
            for one in self._line:
                waiting[one.key] += one.n
            longest = max(waiting, key=lambda one: (waiting[one], one == key))
            refused = [one for one in self._line if one.key == longest][-1]
            self._line.remove(refused)
            refused.granted.set_exception(QueueFull("Too many requests wait already: try again in a moment."))
        try:
            await asyncio.shield(waiter.granted)
        except asyncio.CancelledError:
            if waiter in self._line:
                self._line.remove(waiter)
                self._serve()
            elif waiter.granted.exception() is None:
                self.leave(n)
            raise

    def leave(self, n: int) -> None:
        """Give room for `n` back."""
        self._used -= n
        self._serve()

    def _serve(self) -> None:
        """Grant room, as long as it suffices for whose turn it is; a request for more than the whole runs alone."""
        while self._line:
            waiter = min(self._line, key=lambda one: self._last_turn.get(one.key, 0))
            if self._used and self._used + waiter.n > self._room:
                return
            self._line.remove(waiter)
            self._turn += 1
            self._last_turn[waiter.key] = self._turn
            self._used += waiter.n
            waiter.granted.set_result(None)
        if not self._used:
            self._last_turn.clear()  # addresses are too many to be remembered for ever


@dataclass(slots=True)
class Wanted:
    """An image of a request: its address, how it is shown, and the field that names it.

    Of a `video` those frames are read; a file may have a `name`, and say which `pages` are read. The rest is found
    out: the file, its numbers of pixels and pages, and the milliseconds that it took to get these.
    """

    url: str
    options: ImageOptions = AS_IT_IS
    param: str | None = None
    video: VideoSettings | None = None
    name: str = ""
    pages: str | None = None
    file: bytes | str = b""
    pixels: int = 0
    count: int = 1
    fetch_ms: float = 0.0


class ImageLoader:
    """Turns the addresses in requests into checked images, within the limits of the settings.

    Threads of its own wait for decoders, and no more pixels are held at the same time than `max_pixels_in_flight`.
    `resolve` replaces the policy on addresses, for tests; `pool` are the processes that decode (default: this one).
    Raises BadParameter when the settings name hosts or a folder that cannot be.
    """

    def __init__(
        self, settings: ServerSettings, *, resolve: Resolver | None = None, pool: DecoderPool | None = None
    ) -> None:
        same = {name: getattr(settings, name) for name in ("max_pixels", "max_pages")}
        self.limits = ImageSettings(max_bytes=settings.max_image_bytes, fetch=settings.fetch_images, **same)
        self.max_pixels = settings.max_pixels_in_flight
        self.room = FairQueue(self.max_pixels)
        self.count_room = FairQueue(self.max_pixels // 4)
        self._pool, self._decode = pool, pool.call if pool else operator.call
        self._resolve = resolve or AddressPolicy([pair for host in settings.image_hosts for pair in image_host(host)])
        self._folder = None if settings.media_path is None else ImageFolder(settings.media_path)
        self._fetching = FairQueue(16)
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "opsin-decode")

    def close(self) -> None:
        """Let the threads and processes go once they have nothing to do."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()

    async def call(self, work: Callable[..., T], *values: Any) -> T:
        """What a function of `opsin.worker.decoders` returns. Raises BadImage and its kinds."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, work, *values)

    async def file(self, url: str, key: str) -> bytes | str:
        """The bytes of the file; a `data:` address is left to the decoder. Raises FetchFailed and ImageTooLarge.

        Fetches wait for each other, and keys take turns.
        """
        kind = url[:20].partition(":")[0].strip().lower()
        if kind == "data":
            return url.lstrip()
        if len(url) > MAX_ADDRESS:
            raise FetchFailed(f"The address of the image has more than {MAX_ADDRESS:,} characters: {INSTEAD[3:]}")
        if kind == "file":
            if self._folder is None:
                raise FetchFailed(
                    f"file: addresses are not read here: start the server with --media-path FOLDER, {INSTEAD}"
                )
            return await asyncio.to_thread(self._folder.read, url, self.limits)
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
    """Loads the images of one request of `key`, and holds their pixels until it is told to hold none.

    `sizes` is what the model makes of the sizes of images. Who only counts does not wait for the pixels of those who
    wait for the model.
    """

    def __init__(
        self, loader: ImageLoader, key: str, sizes: ImageSizes | None = None, *, count_only: bool = False
    ) -> None:
        self._loader = loader
        self._room = loader.count_room if count_only else loader.room
        self.key = key
        self._sizes = sizes or ANY_SIZES
        self._pixels = 0

    async def load(self, wanted: Sequence[Wanted]) -> list[list[Image]]:
        """The images of each, loaded side by side. Waits until there is room for the pixels of all; call it once.

        Raises BadImage, ImageTooLarge, ImageUnsupported and FetchFailed; `param` names the field then.
        """
        if not wanted:
            return []
        await _side_by_side(self._open, wanted)
        pixels = sum(one.pixels for one in wanted)
        if pixels > self._loader.max_pixels:
            raise ImageTooLarge(
                f"The images of this request have more than {self._loader.max_pixels:,} pixels together; "
                "send fewer, or scale them down first."
            )
        most = self._loader.limits.max_pages
        pages = sum(one.count * one.options.count for one in wanted if one.count > 1)  # each with its tiles
        if pages > most:
            raise ImageTooLarge(
                f"The documents of this request have {pages:,} pages and tiles together, and {most} are the limit: "
                "send fewer, or choose some with `pages`."
            )
        await self._room.take(self.key, pixels)
        self._pixels = pixels
        images = await _side_by_side(self._decode, wanted)
        self.hold(sum(image.width * image.height for some in images for image in some))
        return images

    def hold(self, pixels: int) -> None:
        """Hold so many pixels from now on, and give the others back."""
        self._room.leave(self._pixels - pixels)
        self._pixels = pixels

    async def _open(self, one: Wanted) -> None:
        begin = time.perf_counter()
        file = await self._loader.file(one.url, self.key)
        if one.video is not None:
            one.file, one.pixels = file, PIXELS
            return
        pixels, one.count, data = await self._loader.call(decoders.measure, file, *self._how(one))
        one.pixels = pixels * min(2, one.options.count)  # the tiles have as many as the whole
        one.file = data or file
        one.fetch_ms = (time.perf_counter() - begin) * 1e3

    async def _decode(self, one: Wanted) -> list[Image]:
        limits, shown = self._loader.limits, (one.options, self._sizes)
        if one.video is not None:
            video = one.video.model_copy(update={"max_bytes": limits.max_bytes})
            frames: list[Image] = await self._loader.call(decoders.decode_video, one.file, limits, video, *shown)
            return frames
        first, *others = await self._loader.call(decoders.decode, one.file, *self._how(one))
        return [dataclasses.replace(first, fetch_ms=one.fetch_ms), *others]

    def _how(self, one: Wanted) -> tuple[ImageSettings, ImageOptions, ImageSizes, str]:
        limits = self._loader.limits.model_copy(update={"pages": one.pages} if one.pages else {})
        return limits, one.options, self._sizes, one.name


async def _side_by_side(work: Callable[[Wanted], Awaitable[T]], wanted: Sequence[Wanted]) -> list[T]:
    """Do it for all images at the same time; the first failure ends the others, and says which image it was."""

    async def one(image: Wanted) -> T:
        try:
            return await work(image)
        except OpsinError as error:
            error.param = image.param  # type: ignore[attr-defined]
            raise

    tasks = [asyncio.ensure_future(one(image)) for image in wanted]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
