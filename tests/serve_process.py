"""`opsin serve` in a process of its own, and what tests want to do to it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

LIMIT = 60.0
READY = re.compile(r"is ready at (http://\S+)")


def environment() -> dict[str, str]:
    """The environment of a server: the test's own folders, none of the settings of whoever runs it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPSIN_")}
    return {**kept, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}


class Served:
    """A running server. Its standard error is read all the time and kept as `lines`."""

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        command: Sequence[str] = (sys.executable, "-m", "opsin"),
    ) -> None:
        self.process = subprocess.Popen(
            [*command, "serve", *arguments],
            env={**environment(), **(env or {})},
            cwd=cwd or Path(__file__).parent,  # where no opsin.toml lies
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as said:
            for line in said:
                with self._changed:
                    self.lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_line(self, pattern: str, times: int = 1) -> re.Match[str]:
        """The line that fits, for the `times`-th time."""
        found: list[re.Match[str]] = []

        def fits() -> bool:
            found[:] = [match for line in self.lines if (match := re.search(pattern, line))]
            return len(found) >= times or not self._reader.is_alive()

        with self._changed:
            assert self._changed.wait_for(fits, LIMIT), f"no line like {pattern!r}: {self.lines}"
        assert len(found) >= times, f"it ended without a line like {pattern!r}: {self.lines}"
        return found[times - 1]

    def wait_ready(self, times: int = 1) -> str:
        """The server's address, once it has been ready so many times."""
        self.url = self.wait_line(READY.pattern, times)[1]
        return self.url

    @property
    def worker(self) -> psutil.Process:
        """The process that holds the model; waits for one that is being started."""
        end = time.monotonic() + LIMIT
        while not (found := self.workers):
            assert time.monotonic() < end, f"there is no worker: {self.lines}"
            time.sleep(0.01)
        return found[0]

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes that hold a model."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "opsin.worker.process" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def metric(self, name: str) -> float:
        """What /metrics says now of a metric without labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=LIMIT).text
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"opsin:{name} ")))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Tell it to end, and its exit code."""
        self.process.send_signal(number)
        return self.exit_code()

    def exit_code(self) -> int:
        """Wait for its end; all it wrote is in `lines` then."""
        code = self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        return code


@contextlib.contextmanager
def served(*arguments: str, **options: Any) -> Iterator[Served]:
    """A server that is ready, on a free port; ended at the end. `options` are those of Served."""
    server = Served("--port", "0", "--no-disk-cache", *arguments, **options)
    try:
        server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            try:
                server.process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                server.process.kill()
                raise
        server.exit_code()


def image_url(seed: int, edge: int = 112) -> str:
    """A data: address of a noisy image; each seed has its own."""
    pixels = np.random.default_rng(seed).integers(0, 255, (edge, edge, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(url: str | None = None, text: str = "What is in this picture?", **fields: Any) -> dict[str, Any]:
    """A chat request."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if url is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"model": "any", "messages": [{"role": "user", "content": content}], **fields}


def events(response: httpx.Response) -> Iterator[dict[str, Any] | None]:
    """The data of a stream's events; None for its [DONE]."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield None if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))


class Stream(threading.Thread):
    """A streamed answer, read in a thread. `begun` is set at the first piece of text, `ended_at` at the end."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url, {**body, "stream": True}
        self.begun = threading.Event()
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.broken: Exception | None = None
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=self._body, timeout=LIMIT) as response:
                response.raise_for_status()
                for event in events(response):
                    if event is None:
                        self.done = True
                        continue
                    self.events.append(event)
                    if any(choice.get("delta", {}).get("content") for choice in event.get("choices", ())):
                        self.begun.set()
        except httpx.HTTPError as error:
            self.broken = error
        finally:
            self.ended_at = time.monotonic()
            self.begun.set()

    def finish(self) -> list[dict[str, Any]]:
        """Wait for its end; all its events."""
        self.join(LIMIT)
        assert not self.is_alive(), "the stream hangs"
        return self.events

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended; None when it did not."""
        return next((c["finish_reason"] for e in self.events for c in e.get("choices", ()) if c["finish_reason"]), None)
