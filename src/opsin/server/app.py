"""The application: its middleware, what it tells of itself (models, properties, health), and its web page.

The page loads nothing from elsewhere, no script or style stands in its markup, and text cannot become markup.
"""

import asyncio
import copy
import hashlib
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.responses import Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from opsin import __version__
from opsin.core.files import read_table
from opsin.server import batches, chat, messages, responses
from opsin.server.batch_runner import BatchRunner, post
from opsin.server.errors import HANDLERS, RESPONSES, UnknownModel
from opsin.server.handler import ModelManager, StatsMiddleware, Watcher
from opsin.server.images import FairQueue, ImageLoader
from opsin.server.middleware import Limits, SecurityMiddleware
from opsin.server.schema import dumps
from opsin.server.watchers import Metrics

_ROUTES = [route for room in (chat, responses, messages) for route in room.router.routes if isinstance(route, Route)]
_CREATE = [route for route in batches.router.routes if isinstance(route, Route) and route.name == "create"]


def create_app(
    model: ModelManager, images: ImageLoader, *, watchers: Sequence[Watcher] = (), keys: tuple[str, ...] = ()
) -> FastAPI:
    """The whole server as an ASGI application; `keys` are the API keys that are let in, none lets everybody in."""
    settings = model.settings
    # As many answers as run may be ready in the engine; the others wait in the queue.
    ahead = min(model.slots, settings.max_queue)
    queue = FairQueue(model.slots + ahead, settings.max_queue - ahead)
    metrics = Metrics(model, queue)
    labels = [hashlib.sha256(key.encode()).hexdigest()[:16] for key in keys]
    runner = BatchRunner(settings, model, labels, lambda: rows_app(model, images))
    # FastAPI's own pages for documentation load scripts from elsewhere.
    app = FastAPI(
        title="Opsin",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=RESPONSES,
        exception_handlers=HANDLERS,
    )
    app.state.model, app.state.images, app.state.queue, app.state.metrics = model, images, queue, metrics
    app.state.priority, app.state.batches, app.state.uploads = 0, runner, asyncio.Semaphore(batches.MAX_UPLOADS)
    app.state.counts = FairQueue(2, settings.max_queue)  # prompts that are only counted: two are prepared at a time
    app.state.root = f"/{path}" if (path := settings.root_path.strip("/")) else ""
    batch_api = () if settings.batch_store == "none" else (batches.router,)
    for one in (chat.router, responses.router, messages.router, *batch_api, router):
        app.include_router(one)
    # The last one added is the outermost.
    app.add_middleware(Limits, settings=settings, routes=_ROUTES + _CREATE)
    app.add_middleware(SecurityMiddleware, settings=settings, keys=keys)
    paths = {*(route.path for route in _ROUTES + _CREATE), "/v1/files"}
    watching = (metrics.finished, *watchers)
    app.add_middleware(StatsMiddleware, watchers=watching, paths=paths, root_path=app.state.root)
    return app


def rows_app(model: ModelManager, images: ImageLoader) -> FastAPI:
    """What answers rows of batches: as live requests are answered, but at low priority and beside their limits."""
    settings = model.settings.model_copy(update={"requests_per_minute": None, "concurrent_requests": None})
    # Rows hold no pixels that live requests may hold, and take no turns from them.
    images = copy.copy(images)
    images.room = FairQueue(images.max_pixels)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, exception_handlers=HANDLERS)
    app.state.model, app.state.images, app.state.queue = model, images, FairQueue(model.slots)
    app.state.priority, app.state.root = -1, ""
    for one in (chat.router, responses.router):
        app.include_router(one)
    app.add_middleware(Limits, settings=settings, routes=_ROUTES)
    app.add_middleware(StatsMiddleware, watchers=(), paths=set())
    return app


_WARM_UP = read_table(__file__, "warm_up.toml")["requests"]
_QUICK_SECONDS = 1.0


async def warm_up(model: ModelManager, images: ImageLoader) -> None:
    """Answer requests of the server's own as long as they are quick: past its keys, metrics and logs."""
    app, began = create_app(model, images), time.perf_counter()
    for body in _WARM_UP:
        if time.perf_counter() - began < _QUICK_SECONDS:
            await asyncio.create_task(post(app, "", "/v1/chat/completions", json=body))


_PAGE_HEADERS = read_table(__file__, "page.toml")

router = APIRouter(tags=["server"])
_page = StaticFiles(packages=[("opsin.server", "page")])
_demo = StaticFiles(packages=[("opsin.models", "demo")])


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model that is served."""
    card = _card(_facts(request))
    return _reply({"object": "list", "data": [card], "has_more": False, "first_id": card["id"], "last_id": card["id"]})


@router.get("/v1/models/{name:path}")
async def model_by_name(name: str, request: Request) -> Response:
    """The model, if it is called so."""
    facts = _facts(request)
    if name != facts["model_alias"]:
        raise UnknownModel(name, facts["model_alias"])
    return _reply(_card(facts))


@router.get("/props")
async def props(request: Request) -> Response:
    """Sizes and abilities of the model, under llama-server's names where it has them."""
    return _reply(_facts(request))


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the server lives and has a model to serve, now or in a moment."""
    failed = request.app.state.model.state == "failed"
    return _reply({"status": "failed"}, 503) if failed else _reply({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether requests are answered: the model is loaded and warmed up, and its process answers."""
    manager: ModelManager = request.app.state.model
    if manager.ready:
        return _reply({"status": "ready"})
    how_far = {"progress": manager.engine.progress} if manager.state == "loading" else {}
    return _reply({"status": manager.state, **how_far}, 503, {"Retry-After": "1"})


@router.get("/metrics", include_in_schema=False)
def show_metrics(request: Request) -> Response:
    """All metrics as text, for Prometheus."""
    text = generate_latest(request.app.state.metrics.registry)
    return Response(text, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


def _reply(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")


def _facts(request: Request) -> dict[str, Any]:
    """What is told of the model, also while it is unloaded. Raises NotReady."""
    model: ModelManager = request.app.state.model
    facts, parallel = model.facts, model.slots
    limits, info = facts.limits, facts.info
    return {
        "default_generation_settings": {"n_ctx": limits.n_ctx_seq},
        "n_ctx": limits.n_ctx,
        "n_vocab": limits.n_vocab,
        "total_slots": parallel,
        "parallel": parallel,
        "model_alias": model.name,
        "model": info.as_dict(),
        "is_demo": facts.is_demo,
        "modalities": {"vision": info.projector is not None, "audio": False},
        "chat_template": model.prompts.template,
        "tools": model.prompts.knows_tools,
        "thinking": model.prompts.reasoning is not None,
        "build_info": f"opsin {__version__}",
        "placement": facts.placement.as_dict(),
        "max_images": model.settings.max_images,
        "max_body_bytes": model.settings.max_body_bytes,
    }


def _card(facts: dict[str, Any]) -> dict[str, Any]:
    meta = {
        "n_ctx": facts["default_generation_settings"]["n_ctx"],
        "n_vocab": facts["n_vocab"],
        "architecture": facts["model"]["architecture"],
    }
    sees = facts["modalities"]["vision"]
    return {
        "id": facts["model_alias"],
        "object": "model",
        "created": 0,
        "owned_by": "opsin",
        # As Anthropic tells it.
        "type": "model",
        "display_name": facts["model_alias"],
        "created_at": "1970-01-01T00:00:00Z",
        # As llama-server and OpenRouter tell it.
        "capabilities": ["completion", "multimodal"] if sees else ["completion"],
        "architecture": {"input_modalities": ["text", "image"] if sees else ["text"], "output_modalities": ["text"]},
        "meta": meta,
    }


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
@router.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def page_file(request: Request, name: str = "index.html") -> Response:
    """A file of the page, or the demo model's image. Raises HTTPException (404) for names outside its folder, too."""
    folder, file = (_demo, "shapes.png") if name == "example.png" else (_page, name)
    response = await folder.get_response(file, request.scope)
    response.headers.update(_PAGE_HEADERS)
    return response
