"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin.core.answer import Answer, Finished, TextDelta, TokenLogprob
from opsin.server.context import Context
from opsin.server.errors import BadField
from opsin.server.handler import CompletionHandler, Job
from opsin.server.limits import Admission
from opsin.server.model import ServedModel
from opsin.server.params import build_prompt, check_model, choices, sampling, top_logprobs, wants_usage
from opsin.server.replies import ChoicesWriter, extensions, finish_reason, token_logprobs
from opsin.server.schema import ChatRequest, NamedTool
from opsin.server.tools import ToolPlan, plan_tools, schema_of

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation of texts and images."""

    async def prepare(model: ServedModel) -> Job:
        admission: Admission = request.state.admission
        return await admission.admit(await _job(body, model, request.app.state.context))

    return CompletionHandler(request, prepare)


async def _job(body: ChatRequest, model: ServedModel, context: Context) -> Job:
    settings = context.settings
    check_model(body.model, model, settings)
    functions = [tool.function for tool in body.tools or ()]
    choice = body.tool_choice.function if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    tools = plan_tools(functions, choice, model.prompts, settings)
    top = top_logprobs(body.top_logprobs, settings, "top_logprobs")
    if top and not body.logprobs:
        raise BadField("top_logprobs needs logprobs: set it to true.", "top_logprobs")
    newer = body.max_completion_tokens is not None
    params = sampling(
        body,
        settings,
        "max_completion_tokens" if newer else "max_tokens",
        body.max_completion_tokens if newer else body.max_tokens,
        logprobs=(top or 0) if body.logprobs else None,
        json_schema=tools.schema or schema_of(body.response_format, settings.max_schema_bytes),
        thinking=body.wants_thinking,
    )
    each = choices(params, body.n, settings)
    writer = ChatWriter(model.name, len(each), tools, logprobs=bool(body.logprobs), include_usage=wants_usage(body))
    prompt = await build_prompt(body, body.messages, tools, model, context)
    return Job([(prompt, one) for one in each], writer, bool(body.stream))


class ChatWriter(ChoicesWriter):
    """Writes the answers to one request."""

    kind, chunk_kind, id_prefix, one_prompt = "chat.completion", "chat.completion.chunk", "chatcmpl", True

    def __init__(self, model: str, n: int, tools: ToolPlan, *, logprobs: bool, include_usage: bool) -> None:
        super().__init__(model, logprobs=logprobs, include_usage=include_usage)
        self._readers = [tools.reader() for _ in range(n)]

    def begin(self) -> bytes:
        """The role of each choice."""
        role = {"role": "assistant", "content": ""}
        return b"".join(self._delta(index, role) for index in range(len(self._readers)))

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        """New text, or the end of a choice with its calls."""
        if isinstance(event, Finished):
            return self._finish(index, event.answer)
        if event.reasoning:
            return self._delta(index, {"reasoning_content": event.text}, event.logprobs)
        reader = self._readers[index]
        text = event.text if reader is None else reader.feed(event.text)
        if not text and not (self._logprobs and event.logprobs):
            return b""
        return self._delta(index, {"content": text}, event.logprobs)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """See ChoicesWriter."""
        reader = self._readers[index]
        text, calls = answer.text, []
        if reader is not None:
            text = (reader.feed(text) + reader.finish()).strip()
            calls = reader.calls
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._told(answer.logprobs),
            "finish_reason": "tool_calls" if calls else finish_reason(answer),
        }

    def _finish(self, index: int, answer: Answer) -> bytes:
        self._answers[index] = answer
        frames, calls, reader = [], [], self._readers[index]
        if reader is not None:
            if text := reader.finish():
                frames.append(self._delta(index, {"content": text}))
            calls = reader.calls
        for number, call in enumerate(calls):
            frames.append(self._delta(index, {"tool_calls": [{"index": number, **call}]}))
        reason = "tool_calls" if calls else finish_reason(answer)
        return b"".join((*frames, self._delta(index, {}, reason=reason, **extensions(answer))))

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
        reason: str | None = None,
        **rest: Any,
    ) -> bytes:
        told = self._told(logprobs) if logprobs else None
        return self._chunk(
            choices=[{"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}], **rest
        )

    def _told(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": token_logprobs(logprobs), "refusal": None} if self._logprobs else None
