"""POST /v1/responses, without a memory of earlier ones."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin.server.chat import schema_of
from opsin.server.context import Context
from opsin.server.errors import BadField
from opsin.server.exchange import Exchange, Job
from opsin.server.model import LoadedModel
from opsin.server.params import check_model, drawn_seed, sampling
from opsin.server.parts import read_messages
from opsin.server.responses_schema import ResponsesRequest
from opsin.server.responses_writer import ResponsesWriter
from opsin.server.tools import plan_tools

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation that is sent whole."""

    async def prepare(model: LoadedModel) -> Job:
        return await _job(body, model, request.app.state.context)

    return Exchange(request, prepare)


async def _job(body: ResponsesRequest, model: LoadedModel, context: Context) -> Job:
    settings = context.settings
    check_model(body.model, model, settings)
    tools = plan_tools(body.functions(), body.choice(), model.prompts, settings)
    switches = body.chat_template_kwargs
    thinking = body.thinking if switches is None or switches.enable_thinking is None else switches.enable_thinking
    params = sampling(
        body,
        settings,
        "max_output_tokens",
        max_tokens=body.max_output_tokens,
        seed=drawn_seed(body.seed),
        json_schema=tools.schema or schema_of(body.format(), settings),
        thinking=thinking,
    )
    conversation = body.messages()
    if not conversation:
        raise BadField("input has no message: ask something.", "input")
    messages = tools.messages(await read_messages(conversation, context))
    prompt = await asyncio.to_thread(model.prompts.build, messages, tools=tools.told, thinking=thinking)
    return Job([(prompt, params)], ResponsesWriter(model.name, body, params, tools), bool(body.stream))
