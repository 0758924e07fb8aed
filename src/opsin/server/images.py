"""The door that images come in by: `data:` always, http(s) and `file:` only where the settings open it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from opsin.core.errors import BadImage, BadParameter, FetchFailed
from opsin.core.image import Image
from opsin.core.server_settings import ServerSettings
from opsin.core.settings import ImageSettings
from opsin.images import read_data_url
from opsin.server.addresses import AddressPolicy
from opsin.server.decoder import Decoder
from opsin.server.media_folder import MediaFolder
from opsin.server.pixels import Holder, PixelBudget, current_holder

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsin.images.fetch import Resolver

T = TypeVar("T")

DETAILS = ("auto", "low", "high")

_FETCHERS = 16
_SHOWN_SCHEME = 20


class ImageLoader:
    """Turns the addresses in requests into checked images, within the limits of the settings.

    Addresses are fetched and images decoded by threads of its own, and no more pixels are held at the same time than
    `max_pixels_in_flight`: see `opsin.server.pixels`. `resolve` replaces the policy on addresses, for tests;
    `decoder` says where files are decoded (default: in this process). Raises BadParameter when the settings name hosts
    or a folder that cannot be.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        resolve: Resolver | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self._limits = ImageSettings(
            max_bytes=settings.max_image_bytes, max_pixels=settings.max_pixels, fetch=settings.fetch_images
        )
        self._decoder = decoder or Decoder()
        self._resolve = resolve or AddressPolicy(settings.image_hosts)
        self._folder = None if settings.media_path is None else MediaFolder(settings.media_path)
        self._room = PixelBudget(settings.max_pixels_in_flight)
        # Apart, so that slow hosts hold up nobody who sends the image itself.
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "opsin-fetch")
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "opsin-decode")

    async def load(self, url: str, *, detail: str | None = None) -> Image:
        """Return the image at `url`, shrunk to 512 pixels when `detail` is low (none, auto and high: as it is).

        Raises BadImage, ImageTooLarge, ImageUnsupported, FetchFailed, BadParameter for another `detail`, and
        QueueFull when too many pixels are in work.
        """
        if detail is not None and detail not in DETAILS:
            raise BadParameter("The detail of an image is auto, low or high.")
        begin = time.perf_counter()
        data = await self._bytes(url)
        fetch_ms = (time.perf_counter() - begin) * 1e3
        pixels = await self._in(self._decoders, lambda: self._decoder.measure(data, self._limits))
        holder = current_holder() or Holder()
        try:
            await self._room.take(pixels, holder)
            image = await self._in(self._decoders, lambda: self._decoder.decode(data, self._limits, detail))
            self._room.give_back(holder, pixels - image.width * image.height)
        finally:
            if holder is not current_holder():
                holder.release()
        return dataclasses.replace(image, fetch_ms=fetch_ms)

    def close(self) -> None:
        """Let the threads go once they have nothing to do."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    async def _bytes(self, url: str) -> bytes:
        """The bytes at an address of any kind that is open."""
        scheme, colon, _ = url[: _SHOWN_SCHEME + 1].partition(":")
        kind = scheme.strip().lower()
        if kind == "data":
            return await self._in(self._decoders, lambda: _data(url.lstrip(), self._limits))
        if kind in {"http", "https"} and colon:
            return await self._fetch(url)
        if kind == "file" and colon:
            if (folder := self._folder) is None:
                raise FetchFailed(
                    "file: addresses are not read here; start the server with --media-path FOLDER, "
                    "or send the image as a data: address."
                )
            return await self._in(self._decoders, lambda: folder.read(url, self._limits))
        raise FetchFailed(
            "The address of an image begins with data:, or with http:// or https:// where fetching is switched on; "
            "give such a one."
        )

    async def _fetch(self, url: str) -> bytes:
        if not self._limits.fetch:
            raise FetchFailed(
                "Images are not fetched from addresses here; start the server with --fetch-images, "
                "or send the image as a data: address."
            )
        from opsin.images.fetch import fetch

        left = threading.Event()
        try:
            return await self._in(
                self._fetchers, lambda: fetch(url, self._limits, self._resolve, cancelled=left.is_set)
            )
        finally:
            left.set()

    @staticmethod
    async def _in(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work)


def _data(url: str, limits: ImageSettings) -> bytes:
    try:
        return read_data_url(url, limits)
    except UnicodeEncodeError:
        raise BadImage("The data: address holds characters that no address can; encode the image again.") from None
