"""A running `opsin serve` on the demo model, for the tests that speak to it from outside."""

import asyncio
import gc
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
START_SECONDS = 90.0


@dataclass(slots=True)
class Server:
    """A server in processes of its own. `base_url` has no slash at its end; `log` is what it said so far."""

    process: subprocess.Popen[str]
    base_url: str = ""
    log: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None

    @property
    def v1(self) -> str:
        """Where OpenAI's clients are pointed to."""
        return f"{self.base_url}/v1"

    def stop(self) -> int:
        """End it as a service manager does; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        if self.reader is not None:
            self.reader.join(10)
        return code


def start_server(home: Path, *flags: str) -> Server:
    """Start `opsin serve` on a free port with a home of its own, and wait until it says that it is ready."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "HF_HOME": str(home / "hf"),
    }
    home.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "opsin", "serve", "--port", "0", *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=env,
        cwd=home,
    )
    server, lines = Server(process), queue.SimpleQueue[str | None]()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.log.append(line)
            lines.put(line)
        process.stderr.close()
        lines.put(None)

    server.reader = threading.Thread(target=listen, daemon=True)
    server.reader.start()
    end = time.monotonic() + START_SECONDS
    try:
        while not server.base_url:
            line = lines.get(timeout=max(0.0, end - time.monotonic()))
            assert line is not None, f"the server ended: {''.join(server.log)}"
            if found := re.search(r"ready at (http://\S+)", line):
                server.base_url = found[1]
    except BaseException:
        server.stop()
        raise
    return server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server on the demo model for all tests that change nothing about it."""
    running = start_server(tmp_path_factory.mktemp("server"))
    yield running
    assert running.stop() == 0, "".join(running.log)


@pytest.fixture(scope="module")
def leftovers() -> Iterator[None]:
    """LiteLLM leaves an event loop open; it is collected here, or another test would be blamed for it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.set_event_loop(None)
        gc.collect()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium without a window."""
    from page_driver import CHROMIUM, playwright_api

    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Any]:
    """The server's page, open."""
    from page_driver import Visit

    visit = Visit(browser, server.base_url, viewport={"width": 1280, "height": 860})
    visit.open()
    yield visit
    visit.close()
