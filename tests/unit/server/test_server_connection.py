"""Clients that do not go on: how long a connection waits for them. Over real sockets, with a tiny application."""

from __future__ import annotations

import asyncio
import json
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


async def told(scope: Scope, receive: Receive, send: Send) -> None:
    """Waits for the body, then says what path and host it was asked for."""
    while (await receive()).get("more_body", False):
        pass
    host = dict(scope["headers"]).get(b"host", b"")
    body = scope["path"].encode() + b"?" + scope["query_string"] + b" of " + host
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def asked(*sent: bytes, app: ASGIApp = told) -> bytes:
    """All that comes for these bytes until the connection ends."""
    got = b""

    async def test() -> None:
        nonlocal got
        async with serving(app, keep_alive=PATIENCE) as connect:
            reader, writer = await connect()
            writer.write(b"".join(sent))
            got = await end_of(reader)
            writer.close()

    within_limit(test)
    return got


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://localhost:80/v1/x%20y?a=b", b"/v1/x y?a=b of localhost:80"),
        (b"HTTPS://localhost", b"/? of localhost"),
        (b"/http://x/", b"/http://x/? of elsewhere"),
    ],
)
def test_a_target_may_be_a_whole_address_whose_host_counts(target: bytes, path: bytes) -> None:
    """RFC 9112, 3.2.2."""
    assert asked(b"GET " + target + b" HTTP/1.1\r\nHost: elsewhere\r\n\r\n").endswith(b"\r\n\r\n" + path)


def test_two_lengths_of_a_body_end_the_connection_after_the_answer() -> None:
    """RFC 9112, 6.3: what follows might be taken for the next request by one side alone."""
    head = b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    got = asked(head, b"0\r\n\r\n", b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert got.count(b"HTTP/1.1 200") == 1
    assert b"connection: close" in got.lower()
    assert b"smuggled" not in got


@pytest.mark.parametrize(
    "head",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n",
    ],
)
def test_a_malformed_request_has_the_error_body(head: bytes, caplog: pytest.LogCaptureFixture) -> None:
    got = asked(head)
    start, _, body = got.partition(b"\r\n\r\n")
    assert start.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in start.lower()
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert not [record for record in caplog.records if record.exc_info]


def test_a_body_that_breaks_while_it_is_answered_only_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    asked(head, b"no number\r\n", app=early)

    async def test() -> None:
        async with serving(early, keep_alive=PATIENCE) as connect:
            reader, writer = await connect()
            writer.write(head)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            writer.write(b"no number\r\n")
            assert await end_of(reader) == b""
            writer.close()

    within_limit(test)
    assert not [record for record in caplog.records if record.exc_info]


def test_who_closes_only_the_sending_side_gets_the_answer() -> None:
    async def test() -> None:
        async with serving(hello) as connect:
            reader, writer = await connect()
            writer.write(REQUEST)
            writer.write_eof()
            got = await end_of(reader)  # the connection ends with it
            assert b"HTTP/1.1 200" in got
            assert got.endswith(b"hello")
            writer.close()

    within_limit(test)


def test_who_closes_both_sides_is_noticed_before_the_answer() -> None:
    left = asyncio.Event()

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async def test() -> None:
        async with serving(waiting) as connect:
            _, writer = await connect()
            writer.write(REQUEST)
            await writer.drain()
            writer.close()
            await left.wait()

    within_limit(test)


def test_half_a_body_is_not_waited_for_when_no_more_comes() -> None:
    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def test() -> None:
        async with serving(reading) as connect:
            reader, writer = await connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            writer.write_eof()
            assert await end_of(reader) == b""
            writer.close()

    within_limit(test)
