"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin.core.parts import Prompt, TextPart
from opsin.server.context import Context
from opsin.server.errors import BadField
from opsin.server.exchange import Exchange, Job
from opsin.server.model import LoadedModel
from opsin.server.params import check_model, choices, sampling, top_logprobs, wants_usage
from opsin.server.parts import check_text
from opsin.server.replies import TextWriter
from opsin.server.schema import CompletionRequest

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Go on with a text as it stands, without a chat template."""

    async def prepare(model: LoadedModel) -> Job:
        return _job(body, model, request.app.state.context)

    return Exchange(request, prepare)


def _job(body: CompletionRequest, model: LoadedModel, context: Context) -> Job:
    settings = context.settings
    check_model(body.model, model, settings)
    check_text(sum(map(len, body.prompt)), settings, "prompt")
    if len(body.prompt) * (body.n or 1) > settings.max_n:
        raise BadField(
            f"The request asks for {len(body.prompt) * (body.n or 1)} answers, and {settings.max_n} are the limit: "
            "send fewer prompts, or a smaller n.",
            "prompt",
        )
    params = sampling(
        body,
        settings,
        max_tokens=body.max_tokens,
        logprobs=top_logprobs(body.logprobs, settings, "logprobs"),
    )
    drawn = choices(params, body.n, settings)
    prompts = [Prompt((TextPart(_whole_unicode(text)),)) for text in body.prompt]
    writer = TextWriter(
        model.name,
        logprobs=body.logprobs is not None,
        include_usage=wants_usage(body),
    )
    return Job([(prompt, one) for prompt in prompts for one in drawn], writer, bool(body.stream))


def _whole_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadField("prompt has half a character (a lone surrogate): send whole Unicode text.", "prompt") from None
    return text
