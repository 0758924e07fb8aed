"""The images' door: what comes out of it, and how much may be inside at the same time."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from io import BytesIO
from typing import Any, TypeVar

import pytest
from api_driver import run, until, world
from PIL import Image

from opsin.core.errors import (
    BadImage,
    BadInput,
    FetchFailed,
    ImageTooLarge,
    OpsinError,
)
from opsin.core.image_options import ImageOptions
from opsin.core.settings import ServerSettings
from opsin.images import OpenPages
from opsin.server.images import ImageLoader, RequestImages, Wanted

T = TypeVar("T")


def png(width: int, height: int) -> bytes:
    file = BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


async def load(gate: ImageLoader, *urls: str, detail: str | None = None) -> list[Any]:
    images = RequestImages(gate, "")
    try:
        loaded = await images.load([Wanted(url, ImageOptions.model_validate({"detail": detail})) for url in urls])
        return [image for some in loaded for image in some]
    finally:
        images.hold(0)


def with_gate(work: Callable[[ImageLoader], Awaitable[T]], **settings: Any) -> T:
    async def go() -> T:
        gate = ImageLoader(ServerSettings(**settings))
        try:
            return await asyncio.wait_for(work(gate), 30)
        finally:
            gate.close()

    return asyncio.run(go())


@pytest.mark.parametrize("detail", [None, "auto", "high", "low"])
def test_a_small_image_comes_as_it_is(detail: str | None) -> None:
    (image,) = with_gate(lambda gate: load(gate, data_url(png(512, 300)), detail=detail))
    assert (image.width, image.height, image.notes) == (512, 300, ())
    assert image.fetch_ms > 0
    assert image.decode_ms > 0


@pytest.mark.parametrize(
    ("size", "small"), [((1024, 600), (512, 300)), ((600, 1200), (256, 512)), ((4000, 2), (512, 1))]
)
def test_low_detail_shrinks_and_gives_another_identity(size: tuple[int, int], small: tuple[int, int]) -> None:
    low, high = (
        with_gate(lambda gate, detail=detail: load(gate, data_url(png(*size)), detail=detail))[0]  # type: ignore[misc]
        for detail in ("low", "high")
    )
    assert (low.width, low.height) == small
    assert (high.width, high.height) == size
    assert len(low.rgb) == small[0] * small[1] * 3
    assert low.sha256 != high.sha256
    assert low.notes == (f"shrunk to {small[0]} by {small[1]} pixels",)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("", FetchFailed),
        ("data:", BadImage),
        ("data:image/png;base64,", BadImage),
        ("data:,\ud800", BadInput),
        ("data:image/png;base64,\ud800%41", BadInput),
        ("data:image/png;base64,AAAA", BadInput),
        (data_url(b"%PDF-1.7 and more"), BadImage),
        (data_url(png(300, 300)), ImageTooLarge),
        (data_url(png(8, 6) + bytes(70_000)), ImageTooLarge),
        ("\ud800:", FetchFailed),
        ("http\ud800://x/", FetchFailed),
        ("x" * 100_000, FetchFailed),
    ],
)
def test_what_is_no_image_gives_one_sentence(url: str, kind: type[OpsinError]) -> None:
    with pytest.raises(kind) as refused:
        with_gate(lambda gate: load(gate, url), max_pixels=80_000, max_image_bytes=65_536)
    assert str(refused.value).endswith(".")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


def test_spaces_before_a_data_address_do_no_harm() -> None:
    assert with_gate(lambda gate: load(gate, " \n" + data_url(png(8, 6))))[0].width == 8


class Slow:
    """Decoding that waits until it is let, and counts the pixels inside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lock = threading.Lock()
        self.inside = self.most = 0
        self.go, self.full = threading.Event(), threading.Event()

        honest = OpenPages.load

        def slow(*args: Any) -> Any:
            images = honest(*args)
            image = images[0]
            with self.lock:
                self.inside += image.width * image.height
                self.most = max(self.most, self.inside)
                if self.inside >= 200:
                    self.full.set()
            assert self.go.wait(10)
            with self.lock:
                self.inside -= image.width * image.height
            return images

        monkeypatch.setattr(OpenPages, "load", slow)


def test_no_more_pixels_than_allowed_are_decoded_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)

    async def work(gate: ImageLoader) -> int:
        loads = [asyncio.ensure_future(load(gate, data_url(png(10, 10)))) for _ in range(12)]
        assert await asyncio.to_thread(slow.full.wait, 10)
        slow.go.set()
        return sum(image.width for (image,) in await asyncio.gather(*loads))

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert with_gate(work, max_pixels_in_flight=250) == 120
    assert slow.most == 200


def test_a_request_holds_its_pixels_until_it_gives_them_back() -> None:
    async def work(gate: ImageLoader) -> None:
        first = RequestImages(gate, "a")
        assert len(await first.load([Wanted(data_url(png(10, 10)))] * 2)) == 2
        second = asyncio.create_task(load(gate, data_url(png(10, 10))))
        done, _ = await asyncio.wait({second}, timeout=0.1)
        assert not done
        first.hold(0)
        assert (await second)[0].width == 10

    with_gate(work, max_pixels_in_flight=250)


def test_a_request_with_more_pixels_than_there_is_room_is_refused() -> None:
    async def work(gate: ImageLoader) -> None:
        with pytest.raises(ImageTooLarge, match="together"):
            await load(gate, data_url(png(10, 10)), data_url(png(20, 10)))
        with pytest.raises(ImageTooLarge, match="250 pixels"):
            await load(gate, data_url(png(20, 20)))

    with_gate(work, max_pixels_in_flight=250)


def test_what_low_detail_and_failures_leave_is_given_back() -> None:
    broken = png(1000, 500)[:800]

    async def work(gate: ImageLoader) -> None:
        for _ in range(3):
            with pytest.raises(BadImage):
                await load(gate, data_url(broken))
        held = [RequestImages(gate, "") for _ in range(3)]
        for images in held:
            await images.load([Wanted(data_url(png(1000, 500)), ImageOptions(detail="low"))])
        for images in held:
            images.hold(0)
        assert gate.room._used == 0

    with_gate(work, max_pixels_in_flight=800_000)


def test_keys_take_turns_and_who_leaves_while_waiting_leaves_nothing_behind() -> None:
    async def work(gate: ImageLoader) -> None:
        first = RequestImages(gate, "a")
        await first.load([Wanted(data_url(png(15, 10)))])
        order: list[str] = []

        async def ask(key: str) -> None:
            images = RequestImages(gate, key)
            await images.load([Wanted(data_url(png(15, 10)))])
            order.append(key)
            images.hold(0)

        tasks = [asyncio.create_task(ask("a"))]
        await until(lambda: gate.room.waiting == 150)
        tasks.append(asyncio.create_task(ask("a")))
        await until(lambda: gate.room.waiting == 300)
        leaving = asyncio.create_task(load(gate, data_url(png(15, 10))))
        tasks.append(asyncio.create_task(ask("b")))
        await until(lambda: gate.room.waiting == 600)
        leaving.cancel()
        first.hold(0)
        await asyncio.gather(*tasks)
        assert order == ["b", "a", "a"]  # a has had a turn already
        assert gate.room._used == gate.room.waiting == 0

    with_gate(work, max_pixels_in_flight=250)


def test_a_fetch_ends_when_nobody_waits_for_it_any_more() -> None:
    """Sixteen clients that hung up on a silent host held everybody else's fetches up for twenty seconds."""

    async def go() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            settings = ServerSettings(fetch_images=True)
            gate = ImageLoader(settings, resolve=lambda _host, _port: ["127.0.0.1"])
            url = f"http://images.invalid:{silent.getsockname()[1]}/x.png"
            loading = asyncio.ensure_future(load(gate, url))
            connection, _ = await asyncio.to_thread(silent.accept)
            loading.cancel()
            begin = time.monotonic()
            await asyncio.wait([loading])
            connection.settimeout(5)
            while await asyncio.to_thread(connection.recv, 1 << 16):
                pass  # what it asked, if it came to that; then it has hung up
            assert time.monotonic() - begin < 5
            connection.close()
            gate.close()

    asyncio.run(go())


def test_keys_take_turns_at_fetching() -> None:
    """Many images of one key, from a host that takes its time, stood before the first of another key."""

    async def go() -> None:
        settings, loop = ServerSettings(fetch_images=True), asyncio.get_running_loop()
        gate = ImageLoader(settings, resolve=lambda _host, _port: ["127.0.0.1"])
        with socket.create_server(("127.0.0.1", 0), backlog=64) as silent, ExitStack() as open_ones:
            silent.setblocking(False)

            def ask(key: str) -> asyncio.Task[Any]:
                url = f"http://images.invalid:{silent.getsockname()[1]}/{key}.png"
                return asyncio.ensure_future(RequestImages(gate, key).load([Wanted(url)]))

            async def asked_for() -> bytes:
                connection, _ = await asyncio.wait_for(loop.sock_accept(silent), 10)
                open_ones.enter_context(connection)
                return await loop.sock_recv(connection, 1 << 16)

            tasks = [ask("greedy") for _ in range(40)]
            for _ in range(16):
                assert b"/greedy.png" in await asked_for()
            tasks.append(ask("modest"))
            await asyncio.sleep(0)
            tasks[0].cancel()
            tasks[1].cancel()
            assert any([b"/modest.png" in await asked_for() for _ in range(2)])
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            gate.close()

    asyncio.run(go())


def test_what_was_done_to_an_image_is_told_in_the_answer() -> None:
    file = BytesIO()
    drawing = Image.new("RGBA", (8, 6), (255, 255, 255, 0))
    drawing.paste((255, 255, 255, 255), (2, 2, 5, 4))
    drawing.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    asked = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]

    async def work() -> None:
        async with world() as w:
            for found in ((await w.chat(messages=asked)), (await w.stream(messages=asked))[-2]):
                (info,) = found["images"]
                assert any("black" in note for note in info["notes"]), info

    run(work())
