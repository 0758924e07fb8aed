"""POST /v1/responses."""

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag, TypeAdapter
from starlette.responses import Response

from opsin.core.answer import Answer, Finished, TextDelta
from opsin.core.request import SamplingParams
from opsin.server import schema
from opsin.server.chat import build_prompt
from opsin.server.choices import ChoicesFormat, check_alone
from opsin.server.counting import CountHandler
from opsin.server.errors import BadField
from opsin.server.handler import Asked, CompletionHandler, ModelManager, Writer, extensions
from opsin.server.images import RequestImages
from opsin.server.parts import ContentIn, History, Sent, TextPartIn, or_text
from opsin.server.stored import KEPT_SECONDS, StoredResponses
from opsin.server.tools import CallReader, plan_tools

router = APIRouter(tags=["OpenAI"])


class FlatTool(schema.FunctionIn, schema.Tool):
    """A function that the model may call, as the Responses API writes it."""


class FlatSchemaFormat(schema.JsonSchema):
    """JSON that keeps to a schema, as the Responses API writes it."""

    type: Literal["json_schema"]


class InputMessage(schema.MessageIn):
    """A message; earlier answers may be sent back as they came."""

    type: Literal["message"] = "message"
    content: ContentIn


class InputCall(schema.CalledFunction):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str


class InputCallOutput(History):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: ContentIn


class InputReference(History):
    """An item of an earlier answer, by its id."""

    type: Literal["item_reference"]
    id: str


class InputOther(History):
    """The reasoning before an earlier answer, which chat templates leave out; and what only OpenAI's tools write."""

    type: str


_KINDS = ("message", "function_call", "function_call_output", "item_reference")


def _kind(item: Any) -> str:
    found = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    # A tuple, as any JSON may stand there, also what cannot be looked up in a set.
    return found if found in _KINDS else "other"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReference, Tag("item_reference")]
    | Annotated[InputOther, Tag("other")],
    Discriminator(_kind),
]


class TextOptions(Sent):
    """The format of the text."""

    format: (
        Annotated[
            schema.TextFormat | schema.ObjectFormat | FlatSchemaFormat | ChoicesFormat, Field(discriminator="type")
        ]
        | None
    ) = None


class ReasoningOptions(Sent):
    """How long the model thinks: `effort` "none" switches it off."""

    effort: str | None = None

    def without_effect(self) -> Iterable[str]:
        """An effort between none and all is no choice here."""
        return () if self.effort in {None, "none"} else ("effort",)


class ResponsesRequest(schema.Conversation):
    """POST /v1/responses."""

    input: Annotated[
        list[InputItem], or_text(lambda text: [{"role": "user", "content": text}], str | list[InputItem])
    ] = Field(min_length=1, max_length=schema.MAX_MESSAGES)
    instructions: str | None = None
    max_output_tokens: schema.Limit = None
    text: TextOptions | None = None
    tools: list[FlatTool | schema.OtherTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | schema.ChosenTool | None = None
    reasoning: ReasoningOptions | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: Literal[False] | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None

    @property
    def wants_thinking(self) -> bool | None:
        """Thinking on or off; None leaves it to the template."""
        wanted = super().wants_thinking
        return False if wanted is None and self.reasoning and self.reasoning.effort == "none" else wanted


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation: sent whole, or what is new behind an answer that is still remembered."""
    return CompletionHandler(request, body, _prepare)


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(body: ResponsesRequest, request: Request) -> Response:
    """Count the tokens that a request to /v1/responses would cost, with those of its images."""
    return CountHandler(request, body, _prepare)


async def _prepare(body: ResponsesRequest, model: ModelManager, images: RequestImages) -> tuple[Asked, Writer]:
    settings = model.settings
    tools = plan_tools(body.tools or (), body.tool_choice, model.prompts, settings)
    wanted = None if body.text is None else body.text.format
    params = schema.sampling(body, settings, body.max_output_tokens, wanted, tools.schema if tools else None)
    if params.labels:
        check_alone(None, tools=tools is not None)
    items = _conversation(body, images.key, model.stored)
    messages = _messages(body.instructions, items)
    if not messages:
        raise BadField("input has no message: ask something.", "input")
    prompt = await build_prompt(body, messages, tools, model, images)
    writer = _ResponsesWriter(model.name, body, params, CallReader(tools) if tools else None)
    if body.store is not False:
        writer.keep = partial(_keep, model.stored, images.key, items)
    return [(prompt, params)], writer


def _conversation(body: ResponsesRequest, key: str, stored: StoredResponses) -> list[Any]:
    """All items of the conversation, also those that the request only refers to. Raises BadField."""
    items: list[Any] = []
    if body.previous_response_id is not None:
        items += _known(stored.conversation(key, body.previous_response_id), "previous_response_id")
    for index, item in enumerate(body.input):
        if isinstance(item, InputReference):
            items.append(_known(stored.item(key, item.id), f"input[{index}].id"))
        else:
            items.append(item)
    return items


def _known(found: Any, param: str) -> Any:
    if found is None:
        raise BadField(
            f"{param} names what this server does not know, or no longer: answers are remembered for "
            f"{KEPT_SECONDS / 60:.0f} minutes unless store is false, so send the conversation whole.",
            param,
        )
    return found


def _keep(stored: StoredResponses, key: str, asked: list[Any], name: str, output: list[dict[str, Any]]) -> None:
    """Remember an answer to the items `asked`, with its own items as a client would send them back."""
    said = _ITEMS.validate_python(output)
    by_id = {one["id"]: item for one, item in zip(output, said, strict=True)}
    stored.keep(key, name, [*asked, *said], by_id, _size([*asked, *said]))


def _size(items: Sequence[Any]) -> int:
    """About how many bytes items take."""
    size = 0
    for item in items:
        parts = getattr(item, "content", None) or getattr(item, "output", None) or ()
        size += sum(len(part.text if isinstance(part, TextPartIn) else part.address) for part in parts)
        size += len(getattr(item, "arguments", "")) + 1024
    return size


def _messages(instructions: str | None, items: Sequence[Any]) -> list[schema.MessageIn]:
    """The conversation as messages of chat completions."""
    found: list[schema.MessageIn] = []
    if instructions:
        found.append(schema.MessageIn.model_validate({"role": "system", "content": instructions}))
    for item in items:
        if isinstance(item, InputMessage):
            found.append(item)
        elif isinstance(item, InputCallOutput):
            found.append(schema.MessageIn(role="tool", content=item.output, tool_call_id=item.call_id))
        elif isinstance(item, InputCall):
            function = schema.CalledFunction(name=item.name, arguments=item.arguments)
            call = schema.ToolCallIn(id=item.call_id, function=function)
            before = found.pop() if found and found[-1].role == "assistant" else schema.MessageIn(role="assistant")
            found.append(before.model_copy(update={"tool_calls": [*(before.tool_calls or ()), call]}))
    return found


_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[InputItem])

# What kinds of items have in their ids, in events about their text, and in their only part.
_PREFIXES = {"message": "msg", "reasoning": "rs"}
_EVENTS: dict[str, dict[str, Any]] = {"message": {"logprobs": []}, "reasoning": {}}
_PARTS: dict[str, dict[str, Any]] = {
    "message": {"type": "output_text", "annotations": [], "logprobs": []},
    "reasoning": {"type": "reasoning_text"},
}


class _ResponsesWriter(Writer):
    """Writes the answer to one request: one object, or events in OpenAI's order."""

    def __init__(self, model: str, body: ResponsesRequest, params: SamplingParams, reader: CallReader | None) -> None:
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
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": body.store is not False,
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
        self._calling: list[dict[str, Any]] = []
        self.keep: Callable[[str, list[Any]], None] | None = None
        """Told the response's id and its items when it is whole."""
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
        text = self._reader.feed(event.text) if self._reader else event.text
        return (self._say("message", text) if text else b"") + self._calls()

    def failed(self, status: int, body: dict[str, Any]) -> bytes:  # noqa: ARG002 - there is one kind here
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
        reader = self._reader
        rest = reader.finish() if reader else ""
        frames = (self._say("message", rest) if rest else b"") + self._calls()
        if self._open is None and not self._output and not self._calling:
            frames += self._say("message", "")
        status = "incomplete" if answer.finish_reason == "length" else "completed"
        frames += self._close("completed" if self._calling else status)
        frames += self._close_call("incomplete" if reader and reader.cut else "completed")
        response = self._ended(answer)
        if self.keep is not None:
            self.keep(self._base["id"], self._output)
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
            frames += self._close_call("completed")
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

    def _calls(self) -> bytes:
        """What is new of the calls."""
        frames = b""
        for told in self._reader.take_told() if self._reader else ():
            if "id" in told:
                frames += self._close("completed") + self._close_call("completed")
                name = told["function"]["name"]
                item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": told["id"], "name": name}
                self._calling.append({**item, "arguments": "", "status": "in_progress"})
                frames += self._event("output_item.added", item=self._calling[-1])
            if piece := told["function"]["arguments"]:
                call = self._calling[-1]
                call["arguments"] += piece
                frames += self._event("function_call_arguments.delta", item_id=call["id"], delta=piece)
        return frames

    def _close_call(self, status: str) -> bytes:
        """The end of the open call, if there is one."""
        if not self._calling or self._calling[-1]["status"] != "in_progress":
            return b""
        call = self._calling[-1]
        call["status"] = status
        about = {"item_id": call["id"], "name": call["name"], "arguments": call["arguments"]}
        frames = self._event("function_call_arguments.done", **about)
        frames += self._event("output_item.done", item=call)
        self._output.append(call)
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
