"""POST /v1/responses. Nothing is stored between requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin.core.answer import Answer, Finished, TextDelta
from opsin.core.sampling import SamplingParams
from opsin.server.context import Context
from opsin.server.errors import BadField, dumps
from opsin.server.handler import CompletionHandler, Job
from opsin.server.limits import Admission
from opsin.server.model import ServedModel
from opsin.server.params import build_prompt, check_model, sampling
from opsin.server.replies import extensions
from opsin.server.schema import ResponsesRequest
from opsin.server.tools import ToolPlan, plan_tools, schema_of

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation that is sent whole."""

    async def prepare(model: ServedModel) -> Job:
        admission: Admission = request.state.admission
        return await admission.admit(await _job(body, model, request.app.state.context))

    return CompletionHandler(request, prepare)


async def _job(body: ResponsesRequest, model: ServedModel, context: Context) -> Job:
    settings = context.settings
    check_model(body.model, model, settings)
    tools = plan_tools(body.tools or (), body.tool_choice, model.prompts, settings)
    wanted = None if body.text is None else body.text.format
    params = sampling(
        body,
        settings,
        "max_output_tokens",
        body.max_output_tokens,
        json_schema=tools.schema or schema_of(wanted, settings.max_schema_bytes),
        thinking=body.wants_thinking,
    )
    messages = body.messages()
    if not messages:
        raise BadField("input has no message: ask something.", "input")
    prompt = await build_prompt(body, messages, tools, model, context)
    return Job([(prompt, params)], ResponsesWriter(model.name, body, params, tools), bool(body.stream))


_PREFIXES = {"message": "msg", "reasoning": "rs"}
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class ResponsesWriter:
    """Writes the answer to one request: one object, or events in OpenAI's order."""

    def __init__(self, model: str, body: ResponsesRequest, params: SamplingParams, tools: ToolPlan) -> None:
        self._base = _base(model, body, params)
        self._reader = tools.reader()
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text: list[str] = []

    def begin(self) -> bytes:
        """The response exists, and is in progress."""
        return b"".join(self._event(f"response.{state}", response=self._base) for state in ("created", "in_progress"))

    def event(self, index: int, event: TextDelta | Finished) -> bytes:  # noqa: ARG002 - there is one choice
        """New text or reasoning, or the end of the answer."""
        if isinstance(event, Finished):
            return self._finish(event.answer)
        if event.reasoning:
            return self._say("reasoning", event.text)
        text = event.text if self._reader is None else self._reader.feed(event.text)
        return self._say("message", text) if text else b""

    def end(self) -> bytes:
        """Nothing: the last event says that it is the last."""
        return b""

    def failed(self, body: dict[str, Any]) -> bytes:
        """The response failed."""
        error = {"code": "server_error", "message": body["error"]["message"]}
        response = {**self._base, "status": "failed", "error": error, "output": self._output}
        return self._event("response.failed", response=response)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer as one object: the result of a stream's events."""
        (answer,) = answers
        if answer.reasoning is not None:
            self._say("reasoning", answer.reasoning)
        self.event(0, TextDelta(answer.text))
        self._finish(answer)
        return self._ended(answer)

    def _finish(self, answer: Answer) -> bytes:
        frames, calls = [], []
        if self._reader is not None:
            if rest := self._reader.finish():
                frames.append(self._say("message", rest))
            calls = self._reader.calls
        if self._open is None and not self._output and not calls:
            frames.append(self._say("message", ""))
        cut = answer.finish_reason == "length" and not calls
        frames.append(self._close("incomplete" if cut else "completed"))
        frames += map(self._call, calls)
        response = self._ended(answer)
        frames.append(self._event(f"response.{response['status']}", response=response))
        return b"".join(frames)

    def _ended(self, answer: Answer) -> dict[str, Any]:
        cut = answer.finish_reason == "length"
        usage = answer.usage
        return {
            **self._base,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
            **extensions(answer),
        }

    def _say(self, kind: str, text: str) -> bytes:
        """More text of an item; a new item if another kind is open."""
        frames = []
        if self._open is not None and self._open["type"] != kind:
            frames.append(self._close("completed"))
        if self._open is None:
            more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            item_id = f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"
            self._open = {"id": item_id, "type": kind, "status": "in_progress", "content": [], **more}
            frames += [
                self._event("response.output_item.added", output_index=len(self._output), item=self._open),
                self._event("response.content_part.added", **self._place(self._open), part=_part(kind, "")),
            ]
        if text:
            self._text.append(text)
            frames.append(self._text_event("delta", self._open, delta=text))
        return b"".join(frames)

    def _close(self, status: str) -> bytes:
        """The end of the open item, if there is one."""
        item, text = self._open, "".join(self._text)
        if item is None:
            return b""
        part = _part(item["type"], text)
        whole = {**item, "status": status, "content": [part]}
        frames = (
            self._text_event("done", item, text=text),
            self._event("response.content_part.done", **self._place(item), part=part),
            self._event("response.output_item.done", output_index=len(self._output), item=whole),
        )
        self._output.append(whole)
        self._open = None
        self._text.clear()
        return b"".join(frames)

    def _call(self, call: dict[str, Any]) -> bytes:
        index, name, arguments = len(self._output), call["function"]["name"], call["function"]["arguments"]
        item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"], "name": name}
        whole = {**item, "arguments": arguments, "status": "completed"}
        self._output.append(whole)
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "arguments": "", "status": "in_progress"}
        return (
            self._event("response.output_item.added", output_index=index, item=begun)
            + self._event("response.function_call_arguments.delta", **place, delta=arguments)
            + self._event("response.function_call_arguments.done", **place, name=name, arguments=arguments)
            + self._event("response.output_item.done", output_index=index, item=whole)
        )

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._output), "content_index": 0}

    def _text_event(self, what: str, item: dict[str, Any], **text: str) -> bytes:
        more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        return self._event(f"response.{_PARTS[item['type']]}.{what}", **self._place(item), **text, **more)

    def _event(self, kind: str, **rest: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._number, **rest}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + dumps(value) + b"\n\n"


def _part(kind: str, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "message" else {}
    return {"type": _PARTS[kind], "text": text, **more}


def _base(model: str, body: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """What every state of a response has in common."""
    echoed = body.model_dump(include={"tools", "text", "metadata"}, by_alias=True, exclude_none=True)
    choice = body.tool_choice
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": echoed.get("metadata", {}),
        "model": model,
        "output": [],
        "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": echoed.get("text") or {"format": {"type": "text"}},
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [{"parameters": None, "strict": None, **tool} for tool in echoed.get("tools", [])],
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
