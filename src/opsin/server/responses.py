"""POST /v1/responses. Nothing is stored between requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field
from starlette.responses import Response

from opsin.core.answer import Answer, Finished, TextDelta
from opsin.core.request import SamplingParams
from opsin.server import schema
from opsin.server.chat import CallReader, build_prompt
from opsin.server.errors import BadField
from opsin.server.handler import Asked, CompletionHandler, ModelManager, Writer, extensions
from opsin.server.images import RequestImages

router = APIRouter(tags=["OpenAI"])


class FlatTool(schema.FunctionIn, schema.Tool):
    """A function that the model may call, as the Responses API writes it."""


class FlatSchemaFormat(schema.JsonSchema):
    """JSON that keeps to a schema, as the Responses API writes it."""

    type: Literal["json_schema"]


class Item(schema.Strict):
    """What an item of an earlier response carries when it is sent back."""

    id: str | None = None
    status: str | None = None


class InputMessage(schema.MessageIn, Item):
    """A message; earlier answers may be sent back as they came."""

    type: Literal["message"] = "message"
    content: schema.ContentIn


class InputCall(schema.CalledFunction, Item):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str


class InputCallOutput(Item):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: schema.ContentIn


class InputReasoning(Item):
    """The reasoning before an earlier answer. Chat templates leave it out, so it is accepted and not used."""

    type: Literal["reasoning"]
    summary: list[Any] | None = Field(None, max_length=0)
    content: list[dict[str, Any]] | None = None
    encrypted_content: None = None


InputItem = Annotated[
    InputMessage | InputCall | InputCallOutput | InputReasoning,
    Field(discriminator="type"),
    BeforeValidator(lambda item: {"type": "message", **item} if isinstance(item, dict) else item),
]


class TextOptions(schema.Strict):
    """The format of the text."""

    format: (
        Annotated[schema.TextFormat | schema.ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None
    ) = None


class ResponsesRequest(schema.Conversation):
    """POST /v1/responses. Nothing is stored: a conversation is sent whole each time."""

    input: Annotated[
        list[InputItem], schema.or_text(lambda text: [{"role": "user", "content": text}], str | list[InputItem])
    ] = Field(min_length=1, max_length=schema.MAX_MESSAGES)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatTool | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    background: Literal[False] | None = None
    include: list[Any] | None = Field(None, max_length=0)

    def messages(self) -> list[schema.MessageIn]:
        """The conversation as messages of chat completions."""
        found: list[schema.MessageIn] = []
        if self.instructions:
            found.append(schema.MessageIn.model_validate({"role": "system", "content": self.instructions}))
        for item in self.input:
            if isinstance(item, InputMessage):
                found.append(item)
            elif isinstance(item, InputCallOutput):
                found.append(schema.MessageIn(role="tool", content=item.output, tool_call_id=item.call_id))
            elif isinstance(item, InputCall):
                call = schema.ToolCallIn(
                    id=item.call_id, function=schema.CalledFunction(name=item.name, arguments=item.arguments)
                )
                if found and found[-1].role == "assistant":
                    found[-1].tool_calls = [*(found[-1].tool_calls or ()), call]
                else:
                    found.append(schema.MessageIn(role="assistant", tool_calls=[call]))
        return found


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation that is sent whole."""
    return CompletionHandler(request, body, _prepare)


async def _prepare(body: ResponsesRequest, model: ModelManager, images: RequestImages) -> tuple[Asked, Writer]:
    tools = schema.plan_tools(body.tools or (), body.tool_choice, model.prompts, model.settings)
    wanted = None if body.text is None else body.text.format
    params = schema.sampling(
        body,
        model.settings,
        body.max_output_tokens,
        json_schema=tools.schema or schema.schema_of(wanted, model.settings.max_schema_bytes),
        thinking=body.wants_thinking,
    )
    messages = body.messages()
    if not messages:
        raise BadField("input has no message: ask something.", "input")
    prompt = await build_prompt(body, messages, tools, model, images)
    return [(prompt, params)], _ResponsesWriter(model.name, body, params, CallReader(tools))


# What kinds of items have in their ids, in events about their text, and in their only part.
_PREFIXES = {"message": "msg", "reasoning": "rs"}
_EVENTS: dict[str, dict[str, Any]] = {"message": {"logprobs": []}, "reasoning": {}}
_PARTS: dict[str, dict[str, Any]] = {
    "message": {"type": "output_text", "annotations": [], "logprobs": []},
    "reasoning": {"type": "reasoning_text"},
}


class _ResponsesWriter(Writer):
    """Writes the answer to one request: one object, or events in OpenAI's order."""

    def __init__(self, model: str, body: ResponsesRequest, params: SamplingParams, reader: CallReader) -> None:
        echoed = body.model_dump(include={"tools", "tool_choice", "text", "metadata"}, by_alias=True, exclude_none=True)
        # What every state of a response has in common.
        self._base: dict[str, Any] = {
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
            "tool_choice": echoed.get("tool_choice", "auto"),
            "tools": [{"parameters": None, "strict": None, **tool} for tool in echoed.get("tools", [])],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }
        self._reader = reader
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text: list[str] = []

    def begin(self) -> bytes:
        return self._event("created", response=self._base) + self._event("in_progress", response=self._base)

    def event(self, index: int, event: TextDelta | Finished) -> bytes:  # noqa: ARG002 - there is one choice
        if isinstance(event, Finished):
            return self._finish(event.answer)
        if event.reasoning:
            return self._say("reasoning", event.text)
        text = self._reader.feed(event.text)
        return self._say("message", text) if text else b""

    def failed(self, body: dict[str, Any]) -> bytes:
        error = {"code": "server_error", "message": body["error"]["message"]}
        return self._event("failed", response=self._base | {"status": "failed", "error": error, "output": self._output})

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        # It is the result of a stream's events.
        (answer,) = answers
        if answer.reasoning is not None:
            self._say("reasoning", answer.reasoning)
        self.event(0, TextDelta(answer.text))
        self._finish(answer)
        return self._ended(answer)

    def _finish(self, answer: Answer) -> bytes:
        rest = self._reader.finish()
        frames = self._say("message", rest) if rest else b""
        calls = self._reader.calls
        if self._open is None and not self._output and not calls:
            frames += self._say("message", "")
        frames += self._close("incomplete" if answer.finish_reason == "length" and not calls else "completed")
        frames += b"".join(map(self._call, calls))
        response = self._ended(answer)
        return frames + self._event(response["status"], response=response)

    def _ended(self, answer: Answer) -> dict[str, Any]:
        cut, usage = answer.finish_reason == "length", answer.usage
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
        frames = b""
        if self._open is not None and self._open["type"] != kind:
            frames += self._close("completed")
        if self._open is None:
            more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            item_id = f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"
            self._open = {"id": item_id, "type": kind, "status": "in_progress", "content": [], **more}
            frames += self._event("output_item.added", item=self._open)
            frames += self._event("content_part.added", self._open, part={**_PARTS[kind], "text": ""})
        if text:
            self._text.append(text)
            frames += self._event(f"{_PARTS[kind]['type']}.delta", self._open, delta=text, **_EVENTS[kind])
        return frames

    def _close(self, status: str) -> bytes:
        """The end of the open item, if there is one."""
        item, text = self._open, "".join(self._text)
        if item is None:
            return b""
        kind = item["type"]
        part = {**_PARTS[kind], "text": text}
        whole = {**item, "status": status, "content": [part]}
        frames = self._event(f"{part['type']}.done", item, text=text, **_EVENTS[kind])
        frames += self._event("content_part.done", item, part=part)
        frames += self._event("output_item.done", item=whole)
        self._output.append(whole)
        self._open = None
        self._text.clear()
        return frames

    def _call(self, call: dict[str, Any]) -> bytes:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"], "name": name}
        whole = {**item, "arguments": arguments, "status": "completed"}
        frames = self._event("output_item.added", item={**item, "arguments": "", "status": "in_progress"})
        place = {"item_id": item["id"]}
        frames += self._event("function_call_arguments.delta", **place, delta=arguments)
        frames += self._event("function_call_arguments.done", **place, name=name, arguments=arguments)
        frames += self._event("output_item.done", item=whole)
        self._output.append(whole)
        return frames

    def _event(self, kind: str, inside: dict[str, Any] | None = None, **rest: Any) -> bytes:
        """One server-sent event about the response, its next item, or the text `inside` that item."""
        value: dict[str, Any] = {"type": f"response.{kind}", "sequence_number": self._number}
        if "response" not in rest:
            value["output_index"] = len(self._output)
        if inside is not None:
            value |= {"item_id": inside["id"], "content_index": 0}
        self._number += 1
        return b"event: response." + kind.encode() + b"\ndata: " + schema.dumps(value | rest) + b"\n\n"
