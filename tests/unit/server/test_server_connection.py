"""Clients that do not go on: how long a connection waits for them. Over real sockets, with a tiny application."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from opsin.server.listener import http_server

PATIENCE = 0.05
LIMIT = 10.0
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serving(
    app: ASGIApp, keep_alive: float = LIMIT, proxies: tuple[str, ...] = ()
) -> AsyncIterator[Callable[[], Awaitable[Client]]]:
    """How to connect to the application; nobody is connected any more when the test ends."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.listen()
        server = http_server(app, PATIENCE, proxies)
        server.config.timeout_keep_alive = keep_alive  # type: ignore[assignment] # whole seconds are too long for a test
        running = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110 - uvicorn tells nobody
            await asyncio.sleep(0)

        async def connect() -> Client:
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, listener.getsockname())
            return await asyncio.open_connection(sock=client, limit=1024)

        try:
            yield connect
            while server.server_state.connections:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0)
        finally:
            server.should_exit = server.force_exit = True
            await running


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(2 * PATIENCE)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await asyncio.sleep(2 * PATIENCE)
    await send({"type": "http.response.body", "body": b"hello"})


async def end_of(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection ends, however it does."""
    got = b""
    try:
        while chunk := await reader.read(65536):
            got += chunk
    except ConnectionResetError:
        pass
    return got


def within_limit(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), LIMIT))  # type: ignore[arg-type] # wait_for takes any awaitable


@pytest.mark.parametrize(("proxies", "seen"), [(("127.0.0.1",), b"https"), (("10.0.0.0/8",), b"http"), ((), b"http")])
def test_a_proxy_is_believed_if_it_is_trusted(proxies: tuple[str, ...], seen: bytes) -> None:
    async def scheme(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"<" + scope["scheme"].encode() + b">"})

    async def test() -> None:
        async with serving(scheme, proxies=proxies) as connect:
            reader, writer = await connect()
            writer.write(REQUEST[:-2] + b"X-Forwarded-Proto: https\r\n\r\n")
            assert b"<" + seen + b">" in await end_of(reader)
            writer.close()

    within_limit(test)


@pytest.mark.parametrize("sent", [REQUEST[:-1], REQUEST[:1], REQUEST + REQUEST[:9]])
def test_a_head_that_does_not_end_ends_the_connection(sent: bytes) -> None:
    async def test() -> None:
        async with serving(hello) as connect:
            reader, writer = await connect()
            writer.write(sent)
            told = await end_of(reader)
            assert told.endswith(b"hello") if sent.startswith(REQUEST) else told == b""
            writer.close()

    within_limit(test)


def test_a_trickled_head_gets_no_more_time() -> None:
    async def test() -> None:
        async with serving(hello) as connect:
            reader, writer = await connect()
            ended = asyncio.create_task(end_of(reader))
            while not ended.done():
                writer.write(b"X")
                await asyncio.sleep(PATIENCE / 10)
            assert await ended == b""
            writer.close()

    within_limit(test)


def test_a_connection_that_is_idle_ends_with_the_keep_alive_time() -> None:
    async def test() -> None:
        async with serving(hello, keep_alive=PATIENCE) as connect:
            (silent, one), (asking, two) = await connect(), await connect()
            two.write(REQUEST)
            assert await end_of(silent) == b""
            assert (await end_of(asking)).endswith(b"hello")
            one.close()
            two.close()

    within_limit(test)


def test_a_slow_model_ends_nothing_and_the_next_request_finds_the_connection() -> None:
    async def test() -> None:
        async with serving(hello) as connect:
            reader, writer = await connect()
            for _ in range(2):
                writer.write(REQUEST)
                reply = await reader.readuntil(b"hello")
                assert reply.startswith(b"HTTP/1.1 200")
                assert b"x-content-type-options: nosniff" in reply.lower()
                await asyncio.sleep(2 * PATIENCE)
            writer.close()

    within_limit(test)


def test_an_answer_that_nobody_reads_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    """The handler is told as of a client that left, and the sequence behind it goes free; so is the connection."""
    seen: list[str] = []
    ended = asyncio.Event()

    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        left = asyncio.create_task(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not left.done():
            await send({"type": "http.response.body", "body": bytes(4096), "more_body": True})
            await asyncio.sleep(0)
        seen.append((await left)["type"])
        ended.set()

    async def test() -> None:
        async with serving(streaming) as connect:
            _, writer = await connect()
            writer.transport.pause_reading()
            writer.write(REQUEST)
            await ended.wait()
            writer.close()

    with caplog.at_level(logging.WARNING, "opsin.server"):
        within_limit(test)
    assert seen == ["http.disconnect"]
    assert "read nothing" in caplog.text


def test_the_end_of_an_answer_that_nobody_reads_does_not_keep_the_connection() -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        size = 60_000  # less than what pauses a writer
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    async def test() -> None:
        async with serving(large, keep_alive=PATIENCE) as connect:
            _, writer = await connect()
            writer.transport.pause_reading()
            writer.write(REQUEST)
            # The client stays: it is the server that lets go, as `serving` sees.
        writer.close()

    within_limit(test)
