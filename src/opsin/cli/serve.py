"""`opsin serve`: settings from all their places, then the process that speaks HTTP and keeps the model's worker."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from typing import Annotated, Any

import typer

from opsin.cli.console import DEMO, say
from opsin.cli.options import flags_of, given
from opsin.core.config import current_folder, read_config
from opsin.core.errors import BadParameter
from opsin.core.settings import ServerSettings
from opsin.jobs.ray_data import connect, worker_resources
from opsin.models import locate, resolve
from opsin.server.app import create_app, warm_up
from opsin.server.handler import ModelManager
from opsin.server.images import ImageLoader
from opsin.server.listener import address_of, bind, check_binding, http_server, read_keys
from opsin.server.ray_serve import deploy
from opsin.server.watchers import AccessLog, Tracing
from opsin.worker import ENDING, DecoderPool, open_workers

_LOOK_SECONDS = 0.5
# The doctor's look at this machine needs the native library, which this process does not load.
_WORKER = (
    "from opsin.doctor.build import unused_gpu_hint; from opsin.worker.process import main; "
    "main(notice=unused_gpu_hint)"
)


@flags_of(ServerSettings, *ServerSettings.model_fields)
def serve(
    *,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the settings and where each is from, and end")
    ] = False,
    ray: Annotated[str | None, typer.Option(metavar="[ADDRESS]", help="run on a Ray cluster, with Ray Serve")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="with --ray: models (default: one a GPU)")] = None,
    cpus_per_worker: Annotated[
        int | None, typer.Option(min=1, help="with --ray: CPUs for each replica (default: one GPU)")
    ] = None,
    **flags: Any,
) -> None:
    """Answer OpenAI-compatible requests over HTTP, and show the web page.

    Settings come from opsin.toml (here, or else in $XDG_CONFIG_HOME/opsin), then the environment (OPSIN_PORT=8080),
    then flags; later ones win.
    """
    config = read_config(given(ServerSettings, flags), os.environ, current_folder(), locate=locate)
    if print_config:
        sys.stdout.write(config.as_toml())
        return
    settings = config.settings
    keys = read_keys(settings, os.environ)
    check_binding(settings, keys)
    if ray is None and (replicas or cpus_per_worker):
        raise BadParameter("--replicas and --cpus-per-worker are for a cluster: give --ray, too, or --workers instead.")
    if ray is not None:
        raise typer.Exit(_serve_on_ray(settings, keys, ray, replicas, cpus_per_worker))
    with bind(settings.host, settings.port) as listener:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
        logging.getLogger("opsin").setLevel(logging.DEBUG if settings.verbose else logging.INFO)
        say("loading the model; GET /ready answers 200 once it is loaded")
        code = asyncio.run(_Front(settings, listener).run(keys))
    raise typer.Exit(code)


def _serve_on_ray(
    settings: ServerSettings, keys: tuple[str, ...], address: str, replicas: int | None, cpus: int | None
) -> int:
    """Serve on a cluster until a signal; the exit code."""
    if settings.workers is not None:
        raise BadParameter("--workers is for one machine: with --ray, give --replicas.")
    resolve(settings.model, settings.mmproj)
    if cpus is not None and settings.threads is None:
        settings = settings.model_copy(update={"threads": cpus})
    with bind(settings.host, settings.port) as listener:  # Ray Serve would not say that the port is taken
        place, port = address_of(listener), listener.getsockname()[1]
    count, resources = worker_resources(connect(address), replicas, cpus)
    told: list[int] = []
    for number in ENDING:
        signal.signal(number, lambda number, _: told.append(number))
    say(f"starting {count} replicas")
    running = deploy(settings, keys, port=port, replicas=count, resources=resources)
    say(f"ready at http://{place} (the page, and /v1 for OpenAI's clients)")
    while not told:
        time.sleep(_LOOK_SECONDS)
    running.shutdown()
    return 130 if told[0] == signal.SIGINT else 0


class _Front:
    """Everything that lives as long as the server."""

    def __init__(self, settings: ServerSettings, listener: socket.socket) -> None:
        self._settings = settings
        self._listener = listener
        self._told: list[int] = []
        self._changed = asyncio.Event()

    async def run(self, keys: tuple[str, ...]) -> int:
        """Serve until a signal, or until the model cannot be used; the exit code."""
        settings, loop = self._settings, asyncio.get_running_loop()
        self._listen_to_signals(loop)
        images = ImageLoader(settings, pool=DecoderPool())
        tracing = [Tracing()] if settings.otel else []
        engine = await asyncio.to_thread(
            open_workers,
            settings.model,
            settings.mmproj,
            settings,
            workers=settings.workers,
            max_queue=settings.max_queue + settings.parallel,  # rows of batches take no places from live requests
            idle_seconds=settings.idle_unload_seconds,
            changed=lambda _: loop.call_soon_threadsafe(self._changed.set),
            command=(sys.executable, "-P", "-c", _WORKER),
        )
        model = ModelManager(settings, engine, slots=engine.slots)
        model.warming = True
        watchers = [AccessLog(as_json=settings.log_json).finished, *(traces.finished for traces in tracing)]
        app = create_app(model, images, watchers=watchers, keys=keys)
        server = http_server(app, settings.slow_reader_seconds, settings.trusted_proxies)
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        try:
            await app.state.batches.start()
            return await self._watch(model, images)
        finally:
            server.should_exit = True
            await serving
            await app.state.batches.close()
            await asyncio.to_thread(engine.close)
            images.close()
            for traces in tracing:
                traces.close()

    async def _watch(self, model: ModelManager, images: ImageLoader) -> int:
        """Say when all is warm, and end in good order; the exit code."""
        engine, said = model.engine, -1
        while not self._told and engine.error is None:
            if engine.state == "ready" and engine.restarts > said:
                said = engine.restarts
                await asyncio.to_thread(lambda: model.prompts)  # a template may take its time
                if model.warming:
                    await warm_up(model, images)
                    gc.freeze()  # what stays is looked through no more, which takes longer than a short answer
                    model.warming = False
                if model.facts.is_demo:
                    say(DEMO)
                if model.facts.notice:
                    say(model.facts.notice)
                address = address_of(self._listener)
                say(f"{model.name} is ready at http://{address} (the page, and /v1 for OpenAI's clients)")
            await self._changed.wait()
            self._changed.clear()
        if self._told:
            await model.drain(self._settings.drain_seconds)
            return 130 if self._told[0] == signal.SIGINT else 0
        assert engine.error is not None
        say(f"opsin: {engine.error}")
        return engine.error.exit_code

    def _listen_to_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        """The first signal asks for a good end; a second one does not wait for it."""

        def told(number: int) -> None:
            if self._told:
                os._exit(4)
            self._told.append(number)
            self._changed.set()

        for number in ENDING:
            # What is ignored stays ignored: that is how nohup and a shell's background jobs survive their terminal.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, told, number)
