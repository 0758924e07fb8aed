"""The model manager on an engine in this process: who is let in, and what a drain waits for; also as HTTP tells it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from api_driver import LIMIT, QUESTION, Gate, World, run, until, world

from opsin.core.errors import EngineClosed, ModelUnreadable
from opsin.prompt import Message
from opsin.server.handler import ModelManager
from opsin.worker import NotReady


async def told(w: World) -> tuple[int, int, int]:
    alive, ready = await w.client.get("/health"), await w.client.get("/ready")
    answer = await w.post(messages=QUESTION)
    for refusal in (ready, answer):
        assert refusal.status_code == 200 or int(refusal.headers["retry-after"]) > 0
    return alive.status_code, ready.status_code, answer.status_code


def with_world(work: Callable[[World], Any], **options: Any) -> None:
    async def all_of_it() -> None:
        async with world(**options) as w:
            await work(w)

    run(all_of_it())


def test_a_server_is_alive_at_once_and_ready_when_its_model_is_warm() -> None:
    async def work(w: World) -> None:
        assert await told(w) == (200, 503, 503)
        with pytest.raises(NotReady) as refused:
            _ = w.manager.facts
        assert (refused.value.http_status, refused.value.retry_after) == (503, 2)
        w.engine.state = "ready"
        assert await told(w) == (200, 200, 200)

    with_world(work, start=False)


@pytest.mark.parametrize(
    ("state", "ready"),
    [("ready", True), ("unloaded", True), ("reloading", True), ("stalled", False), ("restarting", False)],
)
def test_ready_is_said_of_a_model_that_answers_or_is_loaded_for_whoever_asks(state: str, ready: bool) -> None:
    async def work(w: World) -> None:
        w.engine.state = state
        reply = await w.client.get("/ready")
        assert reply.json()["status"] == ("ready" if ready else state)
        assert reply.status_code == (200 if ready else 503)
        assert (await w.client.get("/health")).status_code == 200

    with_world(work)


def test_a_draining_server_is_alive_not_ready_and_takes_nothing_new() -> None:
    async def work(w: World) -> None:
        async def answer() -> None:
            w.manager.enter()
            await until(lambda: w.manager.state == "draining")
            assert await told(w) == (200, 503, 503)
            with pytest.raises(NotReady):
                w.manager.enter()
            # Who is inside still gets the model.
            prompt = w.manager.prompts.build([Message("user", "what is this?")])
            assert (await w.engine.submit(prompt).answer()).text == "a red circle."
            assert not draining.done()

        answering = asyncio.create_task(answer())
        await asyncio.sleep(0)
        draining = asyncio.create_task(w.manager.drain(LIMIT))
        await draining
        await answering

    with_world(work)


def test_who_takes_longer_than_the_drain_is_told_and_not_left_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.server.handler.LAST_WORDS_SECONDS", 5.0)
    gate = Gate()

    async def work(w: World) -> None:
        asking = asyncio.create_task(w.stream(messages=QUESTION))
        await until(lambda: gate.steps > 4)
        asyncio.get_running_loop().call_later(0.2, gate.open.set)  # the engine ends between two steps
        await w.manager.drain(0.05)
        assert (await asking)[-1]["error"]["code"] == EngineClosed.code

    with_world(work, reply=gate)


def test_a_model_that_cannot_be_used_any_more_is_no_server() -> None:
    async def work(w: World) -> None:
        w.engine.state, w.engine.stopped = "failed", ModelUnreadable("gone")
        assert (await w.client.get("/health")).status_code == 503
        assert (await w.post(messages=QUESTION)).status_code == 503

    with_world(work)


def test_the_name_is_the_files_or_the_one_that_was_given() -> None:
    async def work(w: World) -> None:
        assert w.manager.name == "eye"
        assert isinstance(w.manager, ModelManager)

    with_world(work, served_name="eye")
