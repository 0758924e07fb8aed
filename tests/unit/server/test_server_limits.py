"""Rates and numbers."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from opsin.core.server_settings import ServerSettings
from opsin.server.limits import Limits
from opsin.server.pixels import current_holder
from opsin.testing import FakeClock


class Keyed:
    """Gives each request the key in its header `k`, as the doors would."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"key": dict(scope["headers"]).get(b"k", b"").decode()}
        await self.app(scope, receive, send)


class Inside:
    """Answers when it is let; `running` is how many wait for that."""

    def __init__(self) -> None:
        self.running = 0
        self.arrived = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        self.arrived.set()
        try:
            await self.go.wait()
        finally:
            self.running -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


def test_a_key_gets_its_requests_back_evenly_and_apart_from_others() -> None:
    async def go() -> None:
        clock = FakeClock()
        async with client_of(Keyed(Limits(Inside(), ServerSettings(requests_per_minute=3), clock))) as client:

            async def ask(key: str) -> httpx.Response:
                return await client.post("/", headers={"k": key})

            assert [(await ask("a")).status_code for _ in range(4)] == [200, 200, 200, 429]
            refused = await ask("a")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert refused.headers["retry-after"] == "20"
            assert (await ask("b")).status_code == 200
            clock.spend(19_999)
            assert (await ask("a")).headers["retry-after"] == "1"
            clock.spend(1.5)
            assert [(await ask("a")).status_code for _ in range(2)] == [200, 429]
            clock.spend(3_600_000)
            assert [(await ask("a")).status_code for _ in range(4)] == [200, 200, 200, 429]

    asyncio.run(go())


def test_looking_is_not_counted() -> None:
    async def go() -> None:
        async with client_of(Limits(Inside(), ServerSettings(requests_per_minute=1, concurrent_requests=1))) as client:
            assert [(await client.get("/")).status_code for _ in range(5)] == [200] * 5

    asyncio.run(go())


def test_a_key_has_so_many_requests_at_once_and_each_end_makes_room() -> None:
    async def go() -> None:
        inside = Inside()
        inside.go.clear()
        settings = ServerSettings(concurrent_requests=1, requests_per_minute=3)
        async with client_of(Keyed(Limits(inside, settings, FakeClock()))) as client:
            first = asyncio.create_task(client.post("/", headers={"k": "a"}))
            await inside.arrived.wait()
            refused = await client.post("/", headers={"k": "a"})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            first.cancel()  # a client that leaves makes room too
            with pytest.raises(asyncio.CancelledError):
                await first
            inside.go.set()
            assert (await client.post("/", headers={"k": "a"})).status_code == 200
            # the refused one cost nothing of the rate
            assert (await client.post("/", headers={"k": "a"})).status_code == 200
            assert (await client.post("/", headers={"k": "a"})).status_code == 429

    asyncio.run(go())


def test_a_failing_handler_makes_room_and_is_heard() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("mine")

    async def go() -> None:
        limits = Limits(broken, ServerSettings(concurrent_requests=1))
        for _ in range(2):
            with pytest.raises(ValueError, match="mine"):
                await limits({"type": "http", "method": "POST", "state": {}}, _never, _swallow)

    asyncio.run(go())


def test_each_request_holds_its_own_pixels() -> None:
    holders: list[object] = []

    async def looking(scope: Scope, receive: Receive, send: Send) -> None:
        holders.append(current_holder())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def go() -> None:
        async with client_of(Limits(looking, ServerSettings())) as client:
            await asyncio.gather(client.post("/"), client.post("/"))
        assert current_holder() is None

    asyncio.run(go())
    assert None not in holders
    assert len(set(map(id, holders))) == 2


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def _swallow(message: Message) -> None:
    pass
