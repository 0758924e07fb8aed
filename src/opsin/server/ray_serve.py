"""The server on a Ray cluster: replicas with a model each, and fronts that send an image to the one that remembers it.

A front looks at nothing of a request but its first image's address, which for an image in the request is the image
itself: its hash is Ray Serve's session, and a consistent hash of sessions chooses the replica. The whole application
runs in each replica, so keys, limits and stored responses are a replica's own.
"""

import asyncio
import contextlib
import hashlib
import importlib
import logging
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from opsin.core.errors import ImageTooLarge, OpsinError
from opsin.core.settings import ServerSettings
from opsin.jobs.ray_data import RayFailed
from opsin.server.app import create_app, warm_up
from opsin.server.errors import ErrorResponse, explain
from opsin.server.handler import ModelManager
from opsin.server.images import ImageLoader
from opsin.server.middleware import is_loopback
from opsin.worker import DecoderPool, NotReady, WorkerEngine

_IMAGE = re.compile(rb'"(?:image_url|url|data|file_data|file_url|video|input_video)"\s*:\s*"([^"\\]{1,200000000})')
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_MOST_REQUESTS = 256  # that a front passes on at the same time
_MOST_FRONTS = 4
_LOOK_SECONDS = 5.0  # after which a replica is asked again whether it lives


def session_of(body: bytes) -> str:
    """A short name for the first image of a request; empty where it has none."""
    found = _IMAGE.search(body)
    return hashlib.sha256(found[1]).hexdigest()[:32] if found else ""


class Replica:
    """A model in a process of its own, and the application that answers with it."""

    async def __init__(  # type: ignore[misc] # Ray Serve awaits it
        self, settings: ServerSettings, keys: tuple[str, ...], folder: str
    ) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        logging.getLogger("opsin").setLevel(logging.INFO)
        self._engine = WorkerEngine(
            settings.model,
            settings.mmproj,
            settings,
            max_queue=settings.max_queue,
            idle_seconds=settings.idle_unload_seconds,
        )
        await asyncio.to_thread(self._engine.wait_ready)
        self._images = ImageLoader(settings, pool=DecoderPool())
        self._model = ModelManager(settings, self._engine)
        await asyncio.to_thread(lambda: self._model.prompts)
        await warm_up(self._model, self._images)
        self._app = create_app(self._model, self._images, keys=keys)
        await self._app.state.batches.start()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """What the application sends, as many messages at once as there are."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        asked: asyncio.Queue[Message] = asyncio.Queue()
        asked.put_nowait({"type": "http.request", "body": body, "more_body": False})
        running = asyncio.ensure_future(self._app({**scope, "app": None}, asked.get, sent.put))
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                messages = [message]
                while not sent.empty() and (more := sent.get_nowait()) is not None:
                    messages.append(more)
                yield messages
                if messages[-1]["type"] == "http.response.body" and not messages[-1].get("more_body"):
                    break
            await running
        finally:  # also when the client has left
            asked.put_nowait({"type": "http.disconnect"})
            await asyncio.wait([running])

    async def check_health(self) -> None:
        """Raise why nothing can be asked any more: then Ray starts another replica."""
        if self._engine.error is not None:
            raise self._engine.error

    async def __del__(self) -> None:
        """End the model's process, after running answers."""
        if hasattr(self, "_app"):
            await self._app.state.batches.close()
            await self._model.drain(self._model.settings.drain_seconds)
            self._images.close()


class Front:
    """Takes requests and passes each on to a replica."""

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self._replicas, self._most = replicas, max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """The replica's answer, streamed."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._most:
                return _failed(ImageTooLarge(f"The request is larger than {self._most:,} bytes: send smaller images."))
        scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        whole = bytes(body)
        messages = aiter(self._replicas.options(stream=True, session_id=session_of(whole)).answer.remote(scope, whole))
        try:
            (start, *rest) = await anext(messages)
        except importlib.import_module("ray.exceptions").RayError:
            return _failed(NotReady("The replica ended before it answered: ask again in a moment."))
        answer = StreamingResponse(_bodies(rest, messages), start["status"])
        answer.raw_headers = list(start.get("headers", ()))
        return answer


_SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip


async def _bodies(first: list[Message], messages: AsyncIterator[list[Message]]) -> AsyncIterator[bytes]:
    yield b"".join(message.get("body", b"") for message in first)
    async for more in messages:
        yield b"".join(message.get("body", b"") for message in more)


def _failed(error: OpsinError) -> Response:
    return ErrorResponse(*explain(error))


def deploy(
    settings: ServerSettings, keys: tuple[str, ...], *, port: int, replicas: int, resources: dict[str, Any]
) -> Any:
    """Start fronts and replicas, and wait until all are ready; gives Ray Serve, whose `shutdown` ends them.

    Raises RayFailed when a replica cannot be started.
    """
    serve: Any = importlib.import_module("ray.serve")
    config: Any = importlib.import_module("ray.serve.config")
    if not (settings.batch_store or "").startswith("postgres"):  # files of one replica are unknown to the others
        settings = settings.model_copy(update={"batch_store": "none"})
    # Those who wait are told to come again where they would wait for a replica's queue, too.
    most = settings.parallel * 2
    model = serve.deployment(
        Replica,
        num_replicas=replicas,
        ray_actor_options=resources,
        max_ongoing_requests=most,
        health_check_period_s=_LOOK_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_seconds + _LOOK_SECONDS,
        max_constructor_retry_count=1,
        request_router_config=config.RequestRouterConfig(request_router_class=_ROUTER),
    ).bind(settings, keys, str(Path.cwd()))
    front = serve.deployment(
        Front,
        num_replicas=min(replicas, _MOST_FRONTS),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MOST_REQUESTS,
    ).bind(model, settings.max_body_bytes)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    logs = {"log_level": "ERROR", "enable_access_log": False}
    near = is_loopback(settings.host)
    try:
        serve.start(
            proxy_location="HeadOnly" if near else "EveryNode",
            http_options={"host": settings.host, "port": port},
            logging_config=logs,
        )
        serve.run(front, name="opsin", route_prefix="/", logging_config=logs)
    except RuntimeError as error:
        serve.shutdown()
        why = str(error).strip().rpartition("\n")[2][:400]
        raise RayFailed(f"The replicas could not be started ({why}): look at ray status and Ray's logs.") from None
    return serve
