"""A machine of its own for each test: no model cache, no saved default; and a hub that answers on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from opsin.models import Pair
from opsin.models.hub import Hub
from synth import write_pair


@pytest.fixture(autouse=True)
def own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair twice as wide as `tiny`, so that the two do not fit."""
    from dataclasses import replace

    from synth import SHAPES, write_shape

    shape = SHAPES["tiny"]
    text = replace(shape.text, width=128)
    return write_shape(replace(shape, name="wide", text=text), tmp_path_factory.mktemp("wide"))


@dataclass
class FakeHub:
    """What it serves, what it was asked, and how it misbehaves."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    endpoint: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)  # path, Range
    cut_after: list[int] = field(default_factory=list)  # bytes sent of the next answers before the line breaks
    ranges: bool = True
    gated: set[str] = field(default_factory=set)
    token: str | None = None
    lie: dict[str, bytes] = field(default_factory=dict)  # file -> other bytes of the same length
    statuses: list[int] = field(default_factory=list)  # of the next file answers
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def add(self, repo: str, files: dict[str, Path | bytes]) -> None:
        self.repos[repo] = {
            name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()
        }

    def listing(self, repo: str) -> dict[str, object]:
        files = self.repos[repo]
        siblings = [
            {"rfilename": name, "size": len(data), "lfs": {"sha256": hashlib.sha256(data).hexdigest()}}
            for name, data in files.items()
        ]
        return {"id": repo, "sha": self.COMMIT, "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((path, self.headers.get("Range", "")))
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/").removesuffix("/revision/main"))
        else:
            repo, _, rest = path.strip("/").partition("/resolve/")
            self._file(repo, rest.partition("/")[2])

    def _api(self, repo: str) -> None:
        if repo not in self.hub.repos:
            self._answer(401, b'{"error":"Invalid username or password."}')
        else:
            self._answer(200, json.dumps(self.hub.listing(repo)).encode())

    def _file(self, repo: str, name: str) -> None:
        if self.hub.statuses:
            self._answer(self.hub.statuses.pop(0), b"")
            return
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._answer(403 if self.headers.get("Authorization") else 401, b"")
            return
        data = self.hub.lie.get(name, self.hub.repos[repo][name])
        start = 0
        if self.hub.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if self.hub.cut_after:
            body = body[: self.hub.cut_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    state = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    state.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(fake_hub: FakeHub, tmp_path: Path) -> Hub:
    return Hub(fake_hub.endpoint, tmp_path / "hub", pause=0.0)
