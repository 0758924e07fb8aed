"""What the server tells of itself: models, properties, whether it is alive and whether it is ready."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin import __version__
from opsin.server.context import Context
from opsin.server.errors import UnknownModel, dumps
from opsin.server.model import ModelManager

router = APIRouter(tags=["server"])


def _reply(value: dict[str, Any], status: int = 200, **headers: str) -> Response:
    return Response(dumps(value), status, headers or None, "application/json")


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model that is served."""
    return _reply({"object": "list", "data": [_card(_facts(request))]})


@router.get("/v1/models/{name:path}")
async def model_by_name(name: str, request: Request) -> Response:
    """The model, if it is called so."""
    facts = _facts(request)
    if name != facts["model_alias"]:
        raise UnknownModel(f"The model {name[:100]!r} is not served here: ask for {facts['model_alias']!r}.", "model")
    return _reply(_card(facts))


@router.get("/props")
async def props(request: Request) -> Response:
    """Sizes and abilities of the model, under llama-server's names where it has them."""
    return _reply(_facts(request))


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the server lives and has a model to serve, now or in a moment."""
    state = _model(request).state
    return _reply({"status": "failed"}, 503) if state == "failed" else _reply({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether requests are answered: the model is loaded and warmed up, and its process answers."""
    model = _model(request)
    if model.ready:
        return _reply({"status": "ready"})
    return _reply({"status": model.state}, 503, **{"Retry-After": "1"})


def _model(request: Request) -> ModelManager:
    context: Context = request.app.state.context
    return context.model


def _facts(request: Request) -> dict[str, Any]:
    """What is told of the model, also while it is unloaded. Raises NotReady."""
    model = _model(request).model()
    limits, info = model.facts.limits, model.facts.info
    parallel = request.app.state.context.settings.parallel
    return {
        "default_generation_settings": {"n_ctx": limits.n_ctx_seq},
        "n_ctx": limits.n_ctx,
        "n_vocab": limits.n_vocab,
        "total_slots": parallel,
        "parallel": parallel,
        "model_alias": model.name,
        "model": info.as_dict(),
        "is_demo": model.facts.is_demo,
        "modalities": {"vision": info.projector is not None, "audio": False},
        "chat_template": model.prompts.template,
        "tools": model.prompts.knows_tools,
        "thinking": model.prompts.reasoning is not None,
        "build_info": f"opsin {__version__}",
        "placement": model.facts.placement.as_dict(),
    }


def _card(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": facts["model_alias"],
        "object": "model",
        "created": 0,
        "owned_by": "opsin",
        "meta": {
            "n_ctx": facts["default_generation_settings"]["n_ctx"],
            "n_vocab": facts["n_vocab"],
            "architecture": facts["model"]["architecture"],
        },
    }
