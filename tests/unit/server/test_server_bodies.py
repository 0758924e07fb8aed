"""Bodies: their type, size, speed, and what it costs to read them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import httpx
import pytest
from api_driver import CHAT, QUESTION, run, world
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from opsin.core.settings import ServerSettings
from opsin.server.middleware import Limits
from opsin.testing import FakeClock

pytestmark = pytest.mark.slow

JSON = {"content-type": "application/json"}


async def inside(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and says how large it was."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps({"size": size}).encode()})


def limits_of(app: Any = inside, clock: Any = time.monotonic, **settings: Any) -> Limits:
    return Limits(
        app,
        ServerSettings(**settings),
        [Route(CHAT, lambda _: Response(), methods=["POST"])],
        clock,
    )


def ask(*, headers: Any = JSON, content: bytes | AsyncIterator[bytes] = b"{}", **settings: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(limits_of(**settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.post(CHAT, headers=headers, content=content)

    return asyncio.run(go())


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_is_taken(kind: str) -> None:
    assert ask(headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_anything_else_is_refused(kind: str | None) -> None:
    """Forms and plain text are what a page elsewhere can send without asking for leave."""
    assert code(ask(headers={} if kind is None else {"content-type": kind})) == (415, "wrong_content_type")


def test_a_compressed_body_is_told_so() -> None:
    assert code(ask(headers={**JSON, "content-encoding": "gzip"})) == (415, "wrong_encoding")
    assert ask(headers={**JSON, "content-encoding": "identity"}).status_code == 200


@pytest.mark.parametrize("body", [None, {"messages": QUESTION}])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", CHAT), ("PUT", CHAT), ("DELETE", CHAT), ("PATCH", "/v1/responses"), ("POST", "/v1/models"), ("PUT", "/")],
)
def test_wrong_methods_are_told_so_with_and_without_a_body(method: str, path: str, body: Any) -> None:
    async def work() -> None:
        async with world() as w:
            for headers in ({}, JSON, {"content-type": "text/plain"}):
                content = None if body is None else json.dumps(body).encode()
                reply = await w.client.request(method, path, headers=headers, content=content)
                assert code(reply) == (405, "method_not_allowed")
                assert reply.headers["allow"]

    run(work())


@pytest.mark.parametrize("path", [CHAT + "%0a", "/v1/chat%2fcompletions"])
def test_no_spelling_of_a_path_leads_past_the_limits(path: str) -> None:
    async def work() -> None:
        async with world(max_body_bytes=2048) as w:
            assert (await w.post(path, messages=QUESTION)).status_code == 200
            reply = await w.client.post(
                path, content=json.dumps({"messages": QUESTION}), headers={"content-type": "text/plain"}
            )
            assert code(reply) == (415, "wrong_content_type")
            assert code(await w.post(path, messages=[{"role": "user", "content": "x" * 4096}])) == (413, "too_large")

    run(work())


def pieces(count: int, size: int) -> AsyncIterator[bytes]:
    async def give() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * size

    return give()


def test_a_body_up_to_the_limit_is_taken_and_one_above_is_not() -> None:
    assert ask(content=b" " * 2048, max_body_bytes=2048).json()["size"] == 2048
    assert code(ask(content=b" " * 2049, max_body_bytes=2048)) == (413, "too_large")
    assert ask(content=pieces(4, 512), max_body_bytes=2048).json()["size"] == 2048
    assert code(ask(content=pieces(5, 512), max_body_bytes=2048)) == (413, "too_large")


async def run_raw(app: Any, incoming: Iterable[Message]) -> list[Message]:
    """Drive the middleware by hand; after `incoming` nothing more comes."""
    sent: list[Message] = []
    waiting = iter(incoming)

    async def receive() -> Message:
        for message in waiting:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "state": {}, "headers": headers}
    await asyncio.wait_for(app(scope, receive, send), 10)
    return sent


def more(body: bytes) -> Message:
    return {"type": "http.request", "body": body, "more_body": True}


def test_a_body_that_stops_coming_is_not_waited_for() -> None:
    app = limits_of(slow_reader_seconds=0.05)
    assert asyncio.run(run_raw(app, [more(b"{")]))[0]["status"] == 408


def test_a_body_that_drips_is_not_waited_for_and_does_not_count_as_running() -> None:
    clock = FakeClock()

    def dripping() -> Iterable[Message]:
        for _ in range(1000):
            clock.spend(1000)
            yield more(b" ")

    async def go() -> None:
        app = limits_of(clock=clock, slow_reader_seconds=30, concurrent_requests=1)
        assert (await run_raw(app, dripping()))[0]["status"] == 408
        assert clock() < 60
        stuck = asyncio.ensure_future(run_raw(app, [more(b"{")]))
        await asyncio.sleep(0)
        assert (await run_raw(app, [{"type": "http.request", "body": b"{}"}]))[0]["status"] == 200
        stuck.cancel()

    asyncio.run(go())


def test_unfinished_bodies_have_one_bound_together_that_small_ones_pass() -> None:
    async def go() -> None:
        mebi = 2**20
        app = limits_of(max_body_bytes=4 * mebi)
        stuck = [asyncio.ensure_future(run_raw(app, [more(b" " * 4 * mebi)])) for _ in range(4)]
        await asyncio.sleep(0)
        large: Sequence[Message] = [more(b" " * 2 * mebi), {"type": "http.request", "body": b"{}"}]
        assert (await run_raw(app, large))[0]["status"] == 503
        assert (await run_raw(app, [{"type": "http.request", "body": b"{}"}]))[0]["status"] == 200
        for one in stuck:
            one.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        assert (await run_raw(app, large))[0]["status"] == 200

    asyncio.run(go())


def test_a_client_that_leaves_in_the_middle_of_its_body_is_not_an_error() -> None:
    sent = asyncio.run(run_raw(limits_of(), [more(b"{"), {"type": "http.disconnect"}]))
    assert sent[0]["status"] == 499


def test_a_client_that_stays_after_its_body_is_waited_for() -> None:
    """Streams listen for the client's leaving with the same call; that has no limit."""
    heard: list[Message] = []

    async def listening(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append(await receive())
        waiting = asyncio.ensure_future(receive())
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        heard.append({"type": "given up" if done else "still there"})
        waiting.cancel()

    asyncio.run(run_raw(limits_of(listening, slow_reader_seconds=0.05), [{"type": "http.request", "body": b"{}"}]))
    assert [message["type"] for message in heard] == ["http.request", "still there"]


MANY: list[tuple[str, bytes]] = [
    ("numbers as messages", b'{"messages": [' + b"1," * 1_000_000 + b"1]}"),
    ("empty messages", b'{"messages": [' + b"{}," * 100_000 + b"{}]}"),
    ("unknown keys", b"{" + b",".join(b'"k%d": 1' % i for i in range(300_000)) + b"}"),
    ("metadata", b'{"metadata": {' + b",".join(b'"k%d": "v"' % i for i in range(300_000)) + b"}}"),
    ("strings", b'{"messages": [' + b'"",' * 1_000_000 + b'""]}'),
    ("behind escapes", b'{"a": "\\\\\\"", "messages": [' + b"1," * 1_000_000 + b"1]}"),
    ("other encodings", json.dumps({"a": '"' * 3, "messages": [1] * 300_000}).encode("utf-16")),
]


@pytest.mark.parametrize(("name", "body"), MANY, ids=[name for name, _ in MANY])
def test_bodies_of_many_elements_are_refused_without_holding_up_the_others(name: str, body: bytes) -> None:
    async def work() -> None:
        async with world() as w:
            await w.client.get("/health")
            began = time.process_time()
            reply = await w.client.post(CHAT, content=body, headers=JSON)
            spent = time.process_time() - began
            assert code(reply) == (400, "bad_parameter")
            assert len(reply.content) < 1000
            assert spent < 0.5

    run(work())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{}] * 5_000}, "messages"),
        ({"messages": [1] * 40_000}, "messages"),
        ({"messages": [{"role": "user", "content": [1] * 40_000}]}, "messages[0].content"),
        ({"messages": QUESTION * 1_001}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1_001}]}, "messages[0].content"),
    ],
)
def test_messages_and_parts_have_one_limit_and_one_error(body: Any, param: str) -> None:
    async def work() -> None:
        async with world() as w:
            began = time.process_time()
            reply = await w.post(**body)
            assert code(reply) == (400, "bad_parameter")
            assert reply.json()["error"]["param"] == param
            assert "1000" in reply.json()["error"]["message"]
            assert time.process_time() - began < 0.5

    run(work())


def test_text_may_be_full_of_signs_and_escapes() -> None:
    text = '{"a\\": [1, 2], ' * 20_000

    async def work() -> None:
        async with world() as w:
            reply = await w.post(messages=[{"role": "user", "content": text}])
            assert reply.json()["error"]["code"] == "context_overflow"

    run(work())


@pytest.mark.parametrize("name", ["\x1b]0;x", "a\nb", "\u202e"])
def test_an_error_shows_no_control_character_of_a_name(name: str) -> None:
    async def work() -> None:
        async with world() as w:
            for fields in (
                {"logit_bias": {name: 1}},
                {"messages": [{"role": name, "content": "x"}]},
                {"tools": [{"type": name}]},
            ):
                reply = await w.post(**{"messages": QUESTION, **fields})
                assert reply.status_code in {200, 400}
                error = reply.json().get("error", {"message": "", "param": ""})
                assert error["message"].isprintable()
                assert (error["param"] or "").isprintable()

    run(work())
