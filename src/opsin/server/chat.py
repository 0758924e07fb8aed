"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin.core.server_settings import ServerSettings
from opsin.server.context import Context
from opsin.server.errors import BadField
from opsin.server.exchange import Exchange, Job
from opsin.server.model import LoadedModel
from opsin.server.params import ANY_OBJECT, check_model, choices, sampling, schema_text, top_logprobs, wants_usage
from opsin.server.parts import read_messages
from opsin.server.replies import ChatWriter
from opsin.server.schema import ChatRequest, FormatIn, SchemaFormat, TextFormat
from opsin.server.tools import plan_tools

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation of texts and pictures."""

    async def prepare(model: LoadedModel) -> Job:
        return await _job(body, model, request.app.state.context)

    return Exchange(request, prepare)


async def _job(body: ChatRequest, model: LoadedModel, context: Context) -> Job:
    settings = context.settings
    check_model(body.model, model, settings)
    tools = plan_tools(body.tools, body.tool_choice, model.prompts, settings)
    shape = tools.schema or schema_of(body.response_format, settings)
    top = top_logprobs(body.top_logprobs, settings, "top_logprobs")
    if top and not body.logprobs:
        raise BadField("top_logprobs needs logprobs: set it to true.", "top_logprobs")
    switches = body.chat_template_kwargs
    thinking = body.thinking if switches is None or switches.enable_thinking is None else switches.enable_thinking
    params = sampling(
        body,
        settings,
        "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logprobs=(top or 0) if body.logprobs else None,
        json_schema=shape,
        thinking=thinking,
    )
    drawn = choices(params, body.n, settings)
    messages = tools.messages(await read_messages(body.messages, context))
    # In a thread: a stranger's template may take its time.
    prompt = await asyncio.to_thread(model.prompts.build, messages, tools=tools.told, thinking=thinking)
    writer = ChatWriter(
        model.name,
        len(drawn),
        tools,
        logprobs=bool(body.logprobs),
        include_usage=wants_usage(body),
    )
    return Job([(prompt, one) for one in drawn], writer, bool(body.stream))


def schema_of(wanted: FormatIn | None, settings: ServerSettings) -> str | None:
    """The JSON schema that a response format asks for. Raises BadField."""
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    if isinstance(wanted, SchemaFormat):
        return schema_text(wanted.json_schema.schema_, settings, "response_format")
    return ANY_OBJECT if wanted.schema_ is None else schema_text(wanted.schema_, settings, "response_format")
