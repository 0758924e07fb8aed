"""Requests that nobody would write: made from the server's own OpenAPI document, and good ones mutated.

OPSIN_FUZZ_BODIES sets how many mutated requests are sent (10,000; and a 200th of it for each address of the document),
OPSIN_FUZZ_SEED with which numbers they begin.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from local_engine import LocalEngine
from PIL import Image

from opsin.core.backend import BackendLimits
from opsin.core.settings import ServerSettings
from opsin.engine import Engine, Policy
from opsin.prompt import TemplateSource
from opsin.server.app import create_app
from opsin.server.handler import ModelManager
from opsin.server.images import ImageLoader
from opsin.server.listener import http_server
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import N_VOCAB, TURN_TEXT

pytestmark = pytest.mark.slow

BODIES = int(os.environ.get("OPSIN_FUZZ_BODIES", "10000"))
SEED = int(os.environ.get("OPSIN_FUZZ_SEED", "1"))
AT_ONCE = 16
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ tools }}{% endfor %}" + TURN_TEXT
LIMITED = ServerSettings(
    fetch_images=True, image_hosts=("nowhere.invalid",), max_body_bytes=2**20, max_pixels=2**20, max_tokens=8
)


class Server:
    """The application over a fake backend."""

    def __init__(self, settings: ServerSettings = LIMITED) -> None:
        limits = BackendLimits(n_ctx=1024, n_ubatch=256, n_seq_max=8, n_vocab=N_VOCAB, n_embd=4, n_ctx_seq=1024)
        self.engine = Engine(lambda: FakeBackend(limits=limits), policy=Policy(parallel=8))
        source = TemplateSource(TEMPLATE, "fake", "fake", None, "", "", frozenset({TURN_TEXT}))
        self.manager = ModelManager(settings, LocalEngine(self.engine, source))
        self.gate = ImageLoader(settings)
        self.app: FastAPI = create_app(self.manager, self.gate)

    def check_idle(self) -> None:
        """Nothing is stuck, and the next request is answered."""
        end = time.monotonic() + 5  # cancelled ones are freed by the engine's next step
        while ((stats := self.engine.stats).running or self.manager._entered) and time.monotonic() < end:
            time.sleep(0.01)
        assert (stats.running, stats.waiting) == (0, 0), stats
        assert self.gate.room._used == 0
        assert not self.manager._entered
        assert self.engine.error is None

        async def go() -> None:
            async with client_of(self.app) as client:
                for path, body in SEEDS:
                    answer = await client.post(path, json=body)
                    assert answer.status_code == 200, answer.text

        asyncio.run(go())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.gate.close()
    server.engine.close()


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60)


def image_file(kind: str, **options: Any) -> bytes:
    file = BytesIO()
    Image.radial_gradient("L").resize((24, 16)).convert("RGB").save(file, kind, **options)
    return file.getvalue()


FILES = [image_file(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")]
CALL = {
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}


def image_part(data: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def image_block(data: bytes) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
    return {"type": "image", "source": source}


SEEDS: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {
            "model": "fake",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [image_part(FILES[0]), {"type": "text", "text": "What is this?"}]},
                {"role": "assistant", "content": "A circle."},
                {"role": "user", "content": "Sure?"},
            ],
            "max_tokens": 4,
            "temperature": 0.5,
            "top_p": 0.9,
            "n": 2,
            "stop": ["#", "END"],
            "seed": 7,
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"65": 1.5},
            "user": "me",
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Look."}],
            "tools": [{"type": "function", "function": CALL}],
            "tool_choice": "auto",
            "max_completion_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (
        "/v1/responses",
        {
            "model": "fake",
            "instructions": "Be brief.",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello."}]}],
            "max_output_tokens": 4,
            "temperature": 0,
        },
    ),
    ("/v1/completions", {"model": "fake", "prompt": "Once", "max_tokens": 4, "logprobs": 1, "stop": "."}),
    (
        "/v1/messages",
        {
            "model": "fake",
            "max_tokens": 4,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": [image_block(FILES[0]), {"type": "text", "text": "Look."}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {}}]},
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "a", "content": [image_block(FILES[0])]}],
                },
            ],
            "tools": [{"name": "look", "input_schema": CALL["parameters"]}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "stop_sequences": ["#"],
            "thinking": {"type": "disabled"},
        },
    ),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hello."}]}),
    ("/v1/chat/completions/input_tokens", {"messages": [{"role": "user", "content": "Hello."}]}),
]

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, -(2**70), 0.5, 1e308, -1e-308, float("nan"), float("inf"), "",
    " ", "\ud800", "\x00", "\U0010ffff", "a" * 5000, "{{7*7}}", "../../etc/passwd", "data:", "data:,",
    "http://nowhere.invalid/x", "file:///etc/passwd", "null", "auto", [], {}, [[]], [None], {"": None},
    {"type": "text"}, {"url": 1}, ["a"] * 500,
]  # fmt: skip
NAMES = [
    "stream", "n", "stop", "seed", "messages", "content", "role", "type", "image_url", "tools",
    "tool_choice", "grammar", "response_format", "max_tokens", "logit_bias", "guard", "ignore_eos", "max_seconds",
    "top_k", "min_p", "echo",
    "x", "",
]  # fmt: skip
FORMATS: list[Any] = [
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/nowhere"}}},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string", "pattern": "(((("}}},
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as its container and key."""
    found: list[tuple[Any, Any]] = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        found += [(value, key), *places(inner)]
    return found


def bend(body: Any, chance: random.Random) -> Any:
    """Change something in a JSON value."""
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        container, key = chance.choice(places(body) or [([body], 0)])
        match chance.choice(["odd", "odd", "drop", "add", "swap", "deep", "format", "copy"]):
            case "odd":
                container[key] = copy.deepcopy(chance.choice(ODD))
            case "drop":
                del container[key]
            case "add" if isinstance(container, dict):
                container[chance.choice(NAMES)] = copy.deepcopy(chance.choice(ODD))
            case "swap":
                other, at = chance.choice(places(body) or [(container, key)])
                container[key] = copy.deepcopy(other[at]) if key in range(len(container)) or key in container else None
            case "deep":
                container[key] = [[[[[[container[key]]]]]]]
            case "format" if isinstance(body, dict):
                body["response_format"] = chance.choice(FORMATS)
            case "copy" if isinstance(container, list):
                container.extend(copy.deepcopy(container[:3]))
            case _:
                pass
    return body


def damage(data: bytes, chance: random.Random) -> bytes:
    """Change some bytes."""
    out = bytearray(data)
    for _ in range(chance.choice([1, 2, 8])):
        at = chance.randrange(len(out) + 1)
        match chance.choice(["set", "cut", "drop", "insert", "huge", "zero"]):
            case "set":
                out[at : at + 1] = bytes([chance.randrange(256)])
            case "cut":
                del out[at + chance.randrange(len(out) + 1) :]
            case "drop":
                del out[at : at + chance.randrange(1, 40)]
            case "insert":
                out[at:at] = chance.randbytes(chance.randrange(1, 40))
            case "huge":
                out[at : at + 4] = b"\xff\xff\xff\x7f"
            case _:
                out[at : at + 4] = bytes(4)
    return bytes(out)


def mutated(chance: random.Random) -> tuple[str, bytes]:
    """A path and a body: a damaged image in a good request, a bent request, or damaged JSON."""
    path, seed = chance.choice(SEEDS)
    body = copy.deepcopy(seed)
    kind = chance.choice(["image", "bend", "bend", "bytes"])
    if kind == "image":
        path, body = SEEDS[0][0], copy.deepcopy(SEEDS[0][1])
        body["messages"][1]["content"][0] = image_part(damage(chance.choice(FILES), chance))
    elif kind == "bend":
        body = bend(body, chance)
    text = json.dumps(body).encode()
    return path, damage(text, chance) if kind == "bytes" else text


def fault(answer: httpx.Response) -> str | None:
    """What is wrong with an answer; None for one that is in order, refusals among them."""
    if answer.status_code >= 500:
        return f"status {answer.status_code}"
    if '"internal_error"' in answer.text or "Traceback" in answer.text or "site-packages" in answer.text:
        return "an inner error shows"
    if answer.status_code >= 400:
        error = answer.json().get("error", {})
        if answer.request.url.path.startswith("/v1/messages"):
            wrong = set(answer.json()) != {"type", "error", "request_id"} or not error["message"] or not error["type"]
            return "not Anthropic's error body" if wrong else None
        if set(error) != {"message", "type", "param", "code"} or not error["message"]:
            return "not OpenAI's error body"
    return None


def test_mutated_bodies_and_images_leave_it_serving(server: Server) -> None:
    faults: list[str] = []
    statuses: dict[int, int] = {}

    async def send(client: httpx.AsyncClient, number: int) -> None:
        path, body = mutated(random.Random(SEED * 1_000_003 + number))
        answer = await client.post(path, content=body, headers={"content-type": "application/json"})
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        if (wrong := fault(answer)) is not None:
            faults.append(f"{number}: {wrong}: {path} {body[:600]!r} -> {answer.text[:300]}")

    async def go() -> None:
        numbers = iter(range(BODIES))
        async with client_of(server.app) as client:

            async def worker() -> None:
                for number in numbers:
                    await asyncio.wait_for(send(client, number), 60)

            await asyncio.gather(*(worker() for _ in range(AT_ONCE)))

    asyncio.run(go())
    print(f"{sum(statuses.values())} answers by status: {dict(sorted(statuses.items()))}")
    assert not faults, f"{len(faults)} faults, the first: {faults[0]}"
    assert sum(statuses.values()) == BODIES
    # a fuzzer that is always turned away at the first door finds nothing
    assert statuses[200] > BODIES // 20
    assert statuses[400] > BODIES // 20
    server.check_idle()


def test_requests_made_from_the_openapi_document_give_no_server_error(server: Server) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies' own
        import schemathesis
    schema = schemathesis.openapi.from_dict(server.app.openapi())
    asked: dict[str, int] = {}

    async def call(method: str, path: str, **given_parts: Any) -> httpx.Response:
        async with client_of(server.app) as client:
            return await client.request(method, path, **given_parts)

    def check(operation: Any) -> None:
        @settings(
            max_examples=max(10, BODIES // 200),
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def run(case: Any) -> None:
            asked[operation.label] = asked.get(operation.label, 0) + 1
            body = {} if not isinstance(case.body, (dict, list, str, int)) else {"json": case.body}
            answer = asyncio.run(asyncio.wait_for(call(case.method, case.formatted_path, **body), 60))
            assert fault(answer) is None or answer.status_code == 503, (case.method, case.body, answer.text)

        run()

    for result in schema.get_all_operations():
        check(result.ok())  # type: ignore[union-attr]
    print(asked)
    assert {"POST /v1/chat/completions", "POST /v1/responses", "POST /v1/completions", "GET /v1/models"} <= set(asked)
    assert {"POST /v1/messages", "POST /v1/messages/count_tokens"} <= set(asked)
    assert all(count > 0 for count in asked.values())
    server.check_idle()


def raw(chance: random.Random) -> bytes:
    """A whole HTTP request, damaged somewhere."""
    body = json.dumps(SEEDS[3][1]).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return damage(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, chance)


def test_damaged_http_leaves_it_serving(server: Server) -> None:
    """Through uvicorn and sockets: broken heads, wrong lengths, and clients that hang up in the middle."""
    with serving(server.app) as port:
        for number in range(300):
            chance = random.Random(SEED * 7919 + number)
            with socket.create_connection(("127.0.0.1", port), 10) as client:
                client.sendall(raw(chance))
                if chance.random() < 0.7:
                    client.shutdown(socket.SHUT_WR)
                    client.settimeout(10)
                    told = client.makefile("rb").read()
                    assert b" 500 " not in told[:20], (number, told)
                    assert b"Traceback" not in told
        answer = httpx.post(f"http://127.0.0.1:{port}{SEEDS[3][0]}", json=SEEDS[3][1], timeout=10)
        assert answer.status_code == 200
    server.check_idle()


@contextmanager
def serving(app: FastAPI, patience: float = 30.0) -> Iterator[int]:
    """The application behind uvicorn and a socket; its port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # handed on to every connection
        listening.listen(64)
        http = http_server(app, patience)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            http.should_exit = http.force_exit = True
            thread.join(20)
        assert not thread.is_alive()


def test_a_client_that_never_reads_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    """Its answers would hold the model's memory for as long as it likes."""
    server = Server(ServerSettings())
    body = {
        "messages": [{"role": "user", "content": "Go on."}],
        "stream": True,
        "n": 8,
        "logprobs": True,
        "top_logprobs": 20,
        "max_tokens": 100,
        "ignore_eos": True,
        "guard": False,
    }
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    try:
        with serving(server.app, patience=0.3) as port, socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            end = time.monotonic() + 20
            while "read nothing" not in caplog.text:
                assert time.monotonic() < end, "it was not cut off"
                time.sleep(0.02)
            server.check_idle()
            client.settimeout(10)
            received = b"".join(iter(lambda: client.recv(65536), b""))
        assert received.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in received
    finally:
        server.gate.close()
        server.engine.close()
