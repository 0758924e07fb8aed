"""The whole application on the fake backend, asked as an ASGI server asks it."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI
from local_engine import LocalEngine
from PIL import Image

from opsin.core.backend import BackendLimits, Sampler
from opsin.core.request import SamplingParams
from opsin.core.settings import ServerSettings
from opsin.engine import Engine, Policy
from opsin.prompt import TemplateSource
from opsin.server.app import create_app
from opsin.server.handler import ModelManager, RequestStats
from opsin.server.images import ImageLoader
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import TURN_TEXT

LIMIT = 20.0
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}" + TURN_TEXT
)
WITH_TOOLS = "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}" + PLAIN
QUESTION = [{"role": "user", "content": "what is this?"}]
CHAT = "/v1/chat/completions"


def data_url(colour: str = "red", size: tuple[int, int] = (8, 6)) -> str:
    """An image of one colour as an address."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Backend(FakeBackend):
    """Remembers the parameters that answers were drawn with, and can fail before or after some tokens."""

    def __init__(self, reply: Callable[[str], str], **options: Any) -> None:
        super().__init__(reply, **options)
        self.drawn_with: list[SamplingParams] = []

    def sampler(self, params: SamplingParams, seed: int, compiled: object = None) -> Sampler:
        self.drawn_with.append(params.model_copy(update={"seed": seed}))
        return super().sampler(params, seed, compiled)


class Gate:
    """A reply that stops behind its first characters until it is let go on."""

    def __init__(self, text: str = "abcdefgh" * 40, stop_at: int = 4) -> None:
        self.open = threading.Event()
        self.steps = 0
        self._text = text
        self._stop_at = stop_at

    def __call__(self, _: str) -> str:
        self.steps += 1
        if self.steps > self._stop_at:
            assert self.open.wait(LIMIT)
        return self._text


@dataclass
class World:
    """A running application, and what its watcher was told."""

    app: FastAPI
    client: httpx.AsyncClient
    manager: ModelManager
    engine: LocalEngine
    backend: Backend
    records: list[RequestStats] = field(default_factory=list)

    async def post(self, path: str = CHAT, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return await self.client.post(path, json=body, headers=headers)

    async def chat(self, **body: Any) -> Any:
        """A chat completion that must succeed."""
        reply = await self.post(**{"messages": QUESTION, **body})
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def stream(self, path: str = CHAT, **body: Any) -> list[Any]:
        """The events of a stream; "[DONE]" as it is, comments left out."""
        reply = await self.post(path, **body, stream=True)
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/event-stream")
        return events(reply.text)


def events(text: str) -> list[Any]:
    """Server-sent events, read."""
    found: list[Any] = []
    for block in text.split("\n\n"):
        for line in block.splitlines():
            if line.startswith("data: "):
                rest = line.removeprefix("data: ")
                found.append(rest if rest == "[DONE]" else json.loads(rest))
    return found


def text_of(chunks: list[Any], index: int = 0, key: str = "content") -> str:
    """What a streamed choice says."""
    return "".join(
        choice["delta"].get(key) or ""
        for chunk in chunks
        if chunk != "[DONE]"
        for choice in chunk["choices"]
        if choice["index"] == index
    )


@asynccontextmanager
async def world(
    reply: Callable[[str], str] = lambda _: "a red circle.",
    *,
    template: str = PLAIN,
    keys: tuple[str, ...] = (),
    start: bool = True,
    limits: BackendLimits | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """An application with its model loaded and warm."""
    backend = Backend(reply, limits=limits)
    source = TemplateSource(template, "llama", "fake", None, "", "", frozenset({TURN_TEXT}))
    native = Engine(lambda: backend, policy=Policy(parallel=8))
    engine = LocalEngine(native, source, state="ready" if start else "loading")
    chosen = ServerSettings(**settings)
    manager = ModelManager(chosen, engine)
    records: list[RequestStats] = []
    gate = ImageLoader(chosen)
    app = create_app(manager, gate, watchers=[records.append], keys=keys)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=LIMIT) as client:
        try:
            yield World(app, client, manager, engine, backend, records)
        finally:
            await asyncio.to_thread(engine.close)
            gate.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, within a time limit."""
    asyncio.run(asyncio.wait_for(work, LIMIT))


async def until(true: Callable[[], bool]) -> None:
    """Wait for what is no event."""
    while not true():  # noqa: ASYNC110 - `run` bounds it
        await asyncio.sleep(0.002)


class Caller:
    """A client on the wire: what it was sent so far, and a way to hang up."""

    def __init__(self, app: FastAPI, body: dict[str, Any], path: str = CHAT) -> None:
        data = json.dumps(body).encode()
        self.sent: list[Any] = []
        self.gone = asyncio.Event()
        self.arrived = asyncio.Event()
        self._messages = [{"type": "http.request", "body": data, "more_body": False}]
        headers = [
            (b"host", b"127.0.0.1:8000"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
            "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"", "headers": headers,
            "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._messages:
            return self._messages.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self.gone.is_set():
            return  # as uvicorn does: only `receive` tells
        self.sent.append(message)
        self.arrived.set()

    @property
    def text(self) -> str:
        """The body so far."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()
