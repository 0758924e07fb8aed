"""No request holds the server: beside each that once did, `opsin serve` answers others and says that it is alive."""

import json
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hostile_constraints import HOSTILE
from serve_process import LIMIT, Served, question, served

pytestmark = [pytest.mark.slow, pytest.mark.native]

CHAT = "/v1/chat/completions"
ANSWER_SECONDS, HEALTH_SECONDS = 1.5, 1.0
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        with client_of(running) as client:
            client.post(CHAT, json=question(max_tokens=8))
        yield running


def client_of(server: Served) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=LIMIT)


def ask(client: httpx.Client, alone: float = 0.0) -> float:
    """Another client's plain question, and a look at the health; how long both took.

    `alone` is what they took before: on a machine that is busy with other things they take longer.
    """
    began = time.monotonic()
    reply = client.post(CHAT, json=question(max_tokens=8))
    answered = time.monotonic()
    assert reply.status_code == 200, reply.text
    assert client.get("/health").status_code == 200
    healthy = time.monotonic()
    assert answered - began < ANSWER_SECONDS + 4 * alone
    assert healthy - answered < HEALTH_SECONDS + 4 * alone
    return healthy - began


def statuses_beside(server: Served, *bodies: bytes) -> list[int]:
    """Send all at once, ask plain questions beside them until they have ended, and return their statuses."""
    statuses: list[int] = []

    def send(body: bytes) -> None:
        with client_of(server) as client:
            reply = client.post(CHAT, content=body, headers={"content-type": "application/json"})
            statuses.append(reply.status_code)
            assert len(reply.content) < 20_000

    threads = [threading.Thread(target=send, args=(body,)) for body in bodies]
    with client_of(server) as client:
        alone = ask(client)
        for thread in threads:
            thread.start()
        ask(client, alone)
        while any(thread.is_alive() for thread in threads):
            ask(client, alone)
    assert len(statuses) == len(bodies)
    return statuses


def hostile(name: str, **fields: Any) -> bytes:
    """A request with one of the hostile schemas and grammars."""
    asked = dict(HOSTILE[name])
    if (schema := asked.pop("json_schema", None)) is not None:
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": json.loads(schema)}}
    return json.dumps(question(**asked, max_tokens=20, temperature=1.0, **fields)).encode()


GRAMMARS = ["doubling", "pattern-optional-300", "pattern-nested-100", "pairs-15", "optional-1000"]


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_grammar_holds_nobody(server: Served, name: str) -> None:
    assert set(statuses_beside(server, *[hostile(name)] * 3)) <= {200, 400, 422}


def test_an_honest_grammar_and_pattern_are_kept_to(server: Served) -> None:
    pattern = {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"type": "string", "pattern": "^[a-c]{4}$"}},
    }
    with client_of(server) as client:
        for asked, expected in (
            ({"grammar": 'root ::= ("yes" | "no") "!"'}, r"(yes|no)!"),
            ({"response_format": pattern}, r'"[a-c]{4}"'),
        ):
            reply = client.post(CHAT, json=question(**asked, max_tokens=40)).json()
            assert re.fullmatch(expected, reply["choices"][0]["message"]["content"])


@pytest.mark.parametrize("name", GRAMMARS)
def test_max_seconds_and_hanging_up_end_a_grammar(server: Served, name: str) -> None:
    with client_of(server) as client:
        began = time.monotonic()
        body = json.loads(hostile(name, max_seconds=0.3))
        client.post(CHAT, json=body)
        assert time.monotonic() - began < ANSWER_SECONDS
    with client_of(server) as client, suppress(httpx.ReadTimeout):
        client.post(CHAT, json={**body, "max_seconds": None, "max_tokens": 500}, timeout=0.05)
    began = time.monotonic()
    while server.metric("num_requests_running"):  # counters come once a second
        assert time.monotonic() - began < 3 * ANSWER_SECONDS


def test_choices_of_one_grammar_and_ten_different_ones_hold_nobody(server: Served) -> None:
    statuses_beside(server, hostile("optional-1000", n=8))
    alternatives = json.loads(HOSTILE["many-alternatives"]["json_schema"])["anyOf"]
    different = [{"anyOf": alternatives[number:]} for number in range(10)]
    statuses_beside(
        server,
        *(
            json.dumps(question(response_format={"type": "json_object", "schema": schema}, max_tokens=8)).encode()
            for schema in different
        ),
    )


def body_of(start: str, piece: str, count: int, end: str) -> bytes:
    return f"{start}{','.join(piece.replace('#', str(i)) for i in range(count))}{end}".encode()


LARGE = {
    "numbers": lambda: body_of('{"messages": [', "1", 1_000_000, "]}"),
    "unknown-keys": lambda: body_of("{", '"k#": 1', 300_000, "}"),
    "metadata": lambda: body_of('{"metadata": {', '"k#": "v"', 1_000_000, "}}"),
    "empty-messages": lambda: body_of('{"messages": [', '{"role": "user", "content": ""}', 100_000, "]}"),
    "stop-10-MB": lambda: json.dumps(question(stop="a" * 10_000_000)).encode(),
    "stop-60-MB": lambda: json.dumps(question(stop="a" * 60_000_000)).encode(),
    "dots": lambda: json.dumps(question("file://" + "/." * 800_000)).encode(),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_body_holds_nobody_and_takes_a_few_times_its_size(server: Served, name: str) -> None:
    body = LARGE[name]()
    front = Path(f"/proc/{server.process.pid}")
    (front / "clear_refs").write_text("5")  # the peak counts from here
    before = peak(front)
    assert statuses_beside(server, body) == [400]
    assert peak(front) - before < 5 * len(body) + 2**25


def peak(process: Path) -> int:
    """The most memory that it had, in bytes."""
    line = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def connected(server: Served, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), LIMIT)
    client.sendall(sent)
    return client


def test_bodies_that_do_not_end_hold_nobody_and_have_one_bound() -> None:
    """Sixteen of 60 MB took 0.9 GB for ever; two at a byte a second locked everybody else of their key out."""
    limits = ["--max-body-bytes", str(2**23), "--concurrent-requests", "2"]
    with served(*limits) as server, client_of(server) as client, ExitStack() as open_ones:
        alone = ask(client)
        front = psutil.Process(server.process.pid)
        before = front.memory_info().rss
        for size in [1, 1, *[2**23 - 2**20] * 16]:
            head = HEAD + b"Content-Length: %d\r\n\r\n" % (2**23 - 1)
            open_ones.enter_context(connected(server, head + b" " * size))
        ask(client, alone)
        assert front.memory_info().rss - before < 5 * 2**23
        open_ones.close()
        ask(client, alone)


def test_more_idle_connections_than_files_hold_nobody() -> None:
    """Nobody was served, and tracebacks filled the log with 5 MB a second."""
    few = ["sh", "-c", 'ulimit -n 1024; exec "$@"', "sh", sys.executable, "-m", "opsin"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    try:
        with served(command=few) as server, ExitStack() as open_ones:
            with client_of(server) as client:
                alone = ask(client)
            said = len(server.lines)
            for _ in range(1_100):
                open_ones.enter_context(connected(server))
            with client_of(server) as client:
                ask(client, alone)
                ask(client, alone)
            assert len(server.lines) < said + 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_large_bodies_took_is_given_back() -> None:
    """148 MB before, 500 to 610 MB for ever after."""
    with served() as server, client_of(server) as client:
        ask(client)
        front = psutil.Process(server.process.pid)
        before = front.memory_info().rss
        for make in LARGE.values():
            statuses_beside(server, make())
        end = time.monotonic() + LIMIT
        while (now := front.memory_info().rss) > 1.5 * before and time.monotonic() < end:
            ask(client)
        assert now <= 1.5 * before, f"{before / 2**20:.0f} MiB before, {now / 2**20:.0f} MiB after"
