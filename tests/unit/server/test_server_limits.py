"""How often a key may ask, and how much at the same time."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from api_driver import CHAT, run, until, world
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from opsin.core.errors import QueueFull
from opsin.core.settings import ServerSettings
from opsin.server.images import FairQueue, RequestImages
from opsin.server.middleware import Limits
from opsin.testing import FakeClock


class Keyed:
    """Gives each request the key in its header `k`, as the security middleware would."""

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


def limits_of(app: Any, clock: Any = time.monotonic, **settings: Any) -> Limits:
    return Limits(app, ServerSettings(**settings), [Route("/", lambda _: Response(), methods=["POST"])], clock)


def client_of(app: Any) -> httpx.AsyncClient:
    headers = {"content-type": "application/json"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", headers=headers)


def test_a_key_gets_its_requests_back_evenly_and_apart_from_others() -> None:
    async def go() -> None:
        clock = FakeClock()
        async with client_of(Keyed(limits_of(Inside(), clock, requests_per_minute=3))) as client:

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
        async with client_of(limits_of(Inside(), requests_per_minute=1, concurrent_requests=1)) as client:
            assert [(await client.get("/")).status_code for _ in range(5)] == [200] * 5

    asyncio.run(go())


def test_a_key_has_so_many_requests_at_once_and_each_end_makes_room() -> None:
    async def go() -> None:
        inside = Inside()
        inside.go.clear()
        limits = limits_of(inside, FakeClock(), concurrent_requests=1, requests_per_minute=3)
        async with client_of(Keyed(limits)) as client:
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
        async with client_of(limits_of(broken, concurrent_requests=1)) as client:
            for _ in range(2):
                with pytest.raises(ValueError, match="mine"):
                    await client.post("/")

    asyncio.run(go())


class Taking:
    """Takes room for as many answers as the header `n` says, and keeps it until it is let go."""

    def __init__(self) -> None:
        self.queue = FairQueue(16, 248)
        self.go = asyncio.Event()
        self.arrived: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, n = scope["state"], int(dict(scope["headers"])[b"n"])
        with state["bucket"].counted(n - 1):
            await self.queue.take(state["key"], n)
            self.arrived.append(state["key"])
            await self.go.wait()
            self.queue.leave(n)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def test_each_choice_counts() -> None:
    async def go() -> None:
        inside, clock = Taking(), FakeClock()
        limits = limits_of(inside, clock, requests_per_minute=10, concurrent_requests=8)
        async with client_of(Keyed(limits)) as client:

            async def ask(n: int) -> httpx.Response:
                return await client.post("/", headers={"k": "a", "n": str(n)})

            first = asyncio.create_task(ask(8))
            await until(lambda: bool(inside.arrived))
            assert (await ask(1)).status_code == 429
            inside.go.set()
            assert (await first).status_code == 200
            assert [(await ask(8)).status_code, (await ask(1)).status_code] == [200, 429]  # 16 of 10: it owes six
            clock.spend(36_000)
            assert (await ask(1)).status_code == 429
            clock.spend(6_001)
            assert (await ask(1)).status_code == 200

    asyncio.run(go())


def test_a_greedy_key_takes_no_place_from_another() -> None:
    async def go() -> None:
        inside = Taking()
        limits, queue = limits_of(inside), inside.queue
        asked: list[asyncio.Task[int]] = []

        async def ask(key: str, n: int) -> int:
            try:
                return (await client.post("/", headers={"k": key, "n": str(n)})).status_code
            except QueueFull as error:
                return error.http_status

        async with client_of(Keyed(limits)) as client:
            greedy = [asyncio.create_task(ask("greedy", 8)) for _ in range(40)]
            await until(lambda: queue.waiting == 248)
            asked = [asyncio.create_task(ask("modest", 1)) for _ in range(8)]
            done, _ = await asyncio.wait(greedy, return_when=asyncio.FIRST_COMPLETED, timeout=5)
            assert {task.result() for task in done} == {429}
            inside.go.set()
            assert [await task for task in asked] == [200] * 8
            assert inside.arrived[2:6] == ["modest", "greedy"] * 2  # in turn, though forty came before
            statuses = [await task for task in greedy]
            assert statuses.count(200) == 32  # 264 answers in all, less the room the other key took
            assert queue.waiting == queue._used == 0

    asyncio.run(go())


def test_who_leaves_gives_room_back() -> None:
    async def go() -> None:
        queue = FairQueue(2, 2)
        await queue.take("a", 2)
        waiting = [asyncio.create_task(queue.take(key, 1)) for key in "aab"]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):  # the newest of the key with the most
            await waiting[1]
        assert queue.waiting == 2
        waiting[2].cancel()
        queue.leave(2)  # in the same step: b is gone, but not yet out of its line
        await waiting[0]
        await asyncio.sleep(0)
        assert (queue.waiting, queue._used) == (0, 1)
        queue.leave(1)
        await queue.take("b", 9)  # more than there is room for, alone
        last = asyncio.create_task(queue.take("a", 1))
        await until(lambda: queue.waiting == 1)
        queue.leave(9)
        last.cancel()  # it was granted room already
        await asyncio.gather(last, return_exceptions=True)
        assert (queue.waiting, queue._used) == (0, 0)

    asyncio.run(go())


def test_without_keys_each_address_is_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client that asked for much took all turns, as everybody without a key was one."""
    asked: list[str] = []
    take, make = FairQueue.take, RequestImages.__init__

    async def taken(self: FairQueue, key: str, n: int) -> None:
        asked.append(key)
        await take(self, key, n)

    def made(self: RequestImages, loader: Any, key: str, *rest: Any, **more: Any) -> None:
        asked.append(key)
        make(self, loader, key)

    monkeypatch.setattr(FairQueue, "take", taken)
    monkeypatch.setattr(RequestImages, "__init__", made)

    async def work() -> None:
        async with world() as w:
            for address in ("192.0.2.1", "192.0.2.2"):
                transport = httpx.ASGITransport(w.app, client=(address, 1234))
                async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                    await client.post(CHAT, json={"messages": [{"role": "user", "content": "?"}]})
        async with world(keys=("secret",)) as w:
            headers = {"authorization": "Bearer secret"}
            await w.post(messages=[{"role": "user", "content": "?"}], headers=headers)

    run(work())
    assert asked[:4] == ["192.0.2.1"] * 2 + ["192.0.2.2"] * 2
    assert len(set(asked[4:])) == 1
    assert len(asked[-1]) == 16
