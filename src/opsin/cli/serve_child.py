"""The child of `opsin serve`: model, engine and HTTP in one process, on the socket that the parent keeps."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from opsin.cli.console import say
from opsin.compose import open_runtime
from opsin.core.errors import BadInput, OpsinError
from opsin.core.server_settings import ServerSettings
from opsin.server.access_log import AccessLog
from opsin.server.app import create_app
from opsin.server.connection import patient
from opsin.server.context import Context
from opsin.server.ledger import LineLedger
from opsin.server.life import Life, exit_code_of
from opsin.server.metrics import Metrics
from opsin.server.model import LoadedModel
from opsin.server.pictures import PictureGate
from opsin.server.request_stats import Watcher
from opsin.server.security import check_binding, read_keys
from opsin.server.supervisor import address_of
from opsin.server.tracing import Tracing

log = logging.getLogger(__name__)

LAST_BYTES_SECONDS = 5
"""How long open connections may take to read what was answered."""
KEEP_ALIVE_SECONDS = 75
"""Idle connections stay open longer than clients keep them (httpx, and with it OpenAI's client, 5 s): who closes first
must be the client, or a request crosses the close on its way and is lost."""


def main() -> None:
    """Serve until told to end; the exit code tells the parent whether another start may help."""
    listener, line = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    for inherited in (listener, line):
        inherited.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hello = json.loads(_first_line(line))
    settings = ServerSettings(**hello["settings"])
    _log_to_stderr(verbose=settings.verbose)
    try:
        keys = read_keys(settings, os.environ)
        check_binding(settings, keys)
        child = _Child(settings, keys, listener, line, hello["blocked"])
        # Not asyncio.run: at its end that waits for a thread which may load a model for a minute yet.
        code = asyncio.new_event_loop().run_until_complete(child.run())
    except OpsinError as error:
        say(f"opsin: {error}")
        code = error.exit_code
    sys.stderr.flush()
    # For the same reason not by the interpreter's end, which would take native code down under that thread.
    os._exit(code)


class _Child:
    """Everything that lives as long as this process."""

    def __init__(
        self,
        settings: ServerSettings,
        keys: tuple[str, ...],
        listener: socket.socket,
        line: socket.socket,
        blocked: Any,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._listener = listener
        self._line = line
        self._ledger = LineLedger(line, blocked)
        self._life = Life(settings, self._open, ledger=self._ledger)
        self._tracing = Tracing() if settings.otel else None

    async def run(self) -> int:
        """Serve until a signal, the parent's end or a fault; the exit code."""
        settings, life = self._settings, self._life
        pictures = PictureGate(settings, in_flight=life.in_flight)
        watchers: list[Watcher] = [Metrics(life), AccessLog(as_json=settings.log_json)]
        if self._tracing is not None:
            watchers.append(self._tracing)
        app = create_app(Context(settings, life, pictures, tuple(watchers)), keys=self._keys)
        server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                http=patient(settings.slow_reader_seconds),
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=LAST_BYTES_SECONDS,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        living = asyncio.create_task(self._live())
        told = asyncio.create_task(self._told().wait())
        await asyncio.wait({serving, living, told}, return_when=asyncio.FIRST_COMPLETED)
        code = _fault(living)
        if code == 0 and not serving.done():
            await life.drain(settings.drain_seconds)
        server.should_exit = True
        await serving
        told.cancel()
        pictures.close()
        if self._tracing is not None:
            self._tracing.close()
        return code

    async def _live(self) -> None:
        await self._life.start()
        if not self._life.ready:
            return
        self._ledger.ready()
        model = self._life.loaded
        if model is not None:
            _say_ready(model, address_of(self._listener))
        await self._life.watch()

    def _told(self) -> asyncio.Event:
        """Set by SIGTERM, and when the parent is gone."""
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, event.set)

        def at_end() -> None:
            with contextlib.suppress(BlockingIOError):
                if not self._line.recv(1, socket.MSG_DONTWAIT):
                    loop.remove_reader(self._line)
                    event.set()

        loop.add_reader(self._line, at_end)
        return event

    def _open(self) -> LoadedModel:
        settings = self._settings
        runtime = open_runtime(settings.model, settings.mmproj, settings, max_queue=settings.max_queue)
        name = settings.served_name or Path(runtime.engine.info.llm_file).stem
        return LoadedModel(runtime.engine, runtime.prompts, name, runtime.is_demo, runtime.close)


class _Server(uvicorn.Server):
    """Leaves signals alone: a drain comes before the end of the HTTP server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield


def _fault(living: asyncio.Task[None]) -> int:
    """The exit code when the model could not be loaded or its engine died; 0 when it lives."""
    error = living.exception() if living.done() and not living.cancelled() else None
    if error is None:
        return 0
    if not isinstance(error, OpsinError):
        log.error("the model could not be loaded", exc_info=error)
    say(f"opsin: {error}" if isinstance(error, OpsinError) else f"opsin: {type(error).__name__}: {error}")
    return exit_code_of(error)


def _say_ready(model: LoadedModel, address: str) -> None:
    if model.is_demo:
        say("This is the demo model for drawn scenes; for photographs get a real one: opsin pull llava-1.5-7b")
    from opsin.doctor.build import unused_gpu_hint

    hint = unused_gpu_hint()
    if hint:
        say(hint)
    say(f"{model.name} is ready at http://{address} (the page, and /v1 for OpenAI's clients)")


def _first_line(line: socket.socket) -> bytes:
    read = b""
    while not read.endswith(b"\n"):
        data = line.recv(65536)
        if not data:
            raise BadInput("The server was started without its parent: use `opsin serve`.")
        read += data
    return read


def _log_to_stderr(*, verbose: bool) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("opsin").setLevel(logging.DEBUG if verbose else logging.INFO)
    # llama.cpp's own log has a handler of its own where --verbose asks for it.
    logging.getLogger("opsin.native").propagate = False
