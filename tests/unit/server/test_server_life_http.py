"""What clients are told over HTTP while there is no model: readiness, refusals, and when to come back."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
from test_server_life import LIMIT, Opener, run, until

from opsin.core.server_settings import ServerSettings
from opsin.server.app import create_app
from opsin.server.context import Context
from opsin.server.life import Life
from opsin.server.pictures import PictureGate

BODY = {"model": "any", "messages": [{"role": "user", "content": "what is this?"}]}


def with_server(work: Callable[[httpx.AsyncClient, Life, Opener], Any]) -> None:
    async def all_of_it() -> None:
        settings, opener = ServerSettings(), Opener()
        life, pictures = Life(settings, opener), PictureGate(settings)
        transport = httpx.ASGITransport(create_app(Context(settings, life, pictures)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=LIMIT) as client:
            await work(client, life, opener)
        await life.close()
        pictures.close()

    run(all_of_it())


async def told(client: httpx.AsyncClient) -> tuple[int, int, int]:
    alive = await client.get("/health")
    ready = await client.get("/ready")
    answer = await client.post("/v1/chat/completions", json=BODY)
    for refusal in (ready, answer):
        assert refusal.status_code == 200 or int(refusal.headers["retry-after"]) > 0
    return alive.status_code, ready.status_code, answer.status_code


def test_a_server_is_alive_at_once_and_ready_when_its_model_is_warm() -> None:
    async def work(client: httpx.AsyncClient, life: Life, opener: Opener) -> None:
        opener.gate.clear()
        starting = asyncio.create_task(life.start())
        await asyncio.sleep(0)
        assert await told(client) == (200, 503, 503)
        opener.gate.set()
        await starting
        assert await told(client) == (200, 200, 200)

    with_server(work)


def test_a_draining_server_is_alive_not_ready_and_takes_nothing_new() -> None:
    async def work(client: httpx.AsyncClient, life: Life, _opener: Opener) -> None:
        await life.start()
        with life.entered():
            draining = asyncio.create_task(life.drain(LIMIT))
            await until(lambda: life.state == "draining")
            assert await told(client) == (200, 503, 503)
        assert await draining is True

    with_server(work)
