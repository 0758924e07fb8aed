"""What a request to /v1/messages may contain, and its conversation as messages of chat completions."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opsin.core.settings import PageList
from opsin.server import schema
from opsin.server.parts import MAX_PARTS, History, ImageFields, ImagePartIn, ImageUrl, PartIn, Sent, TextPartIn, or_text
from opsin.server.responses import FlatSchemaFormat

_BILLING = "x-anthropic-billing-header:"
"""Begins a system block that Claude Code puts first, another one each time: no prefix could be remembered behind it."""


class TextBlock(History):
    """Text."""

    type: Literal["text"]
    text: str


class ImageSource(History):
    """The bytes of an image, or its address, as the server's settings allow it."""

    type: Literal["base64", "url"]
    media_type: str = "image/png"
    data: str = ""
    url: str = ""


class ImageBlock(History, ImageFields):
    """An image, or a PDF, whose pages become images."""

    type: Literal["image", "document"]
    source: ImageSource
    pages: PageList | None = None


class ThinkingBlock(History):
    """What a model thought before an earlier answer; thoughts that only Anthropic can read are left out."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""


class CallBlock(History):
    """A call of a tool that the model made earlier."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: schema.Schema


def _text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


Shown = Annotated[TextBlock | ImageBlock, Field(discriminator="type")]
_Texts = Annotated[list[TextBlock], Field(max_length=MAX_PARTS)]
_Shown = Annotated[list[Shown], Field(max_length=MAX_PARTS)]


class ResultBlock(History):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[_Shown, or_text(_text, str | _Shown)] | None = None
    is_error: bool | None = None


_Block = Annotated[TextBlock | ImageBlock | CallBlock | ResultBlock | ThinkingBlock, Field(discriminator="type")]
_Blocks = Annotated[list[_Block], Field(max_length=MAX_PARTS)]


class AnthropicMessage(History):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[_Blocks, or_text(_text, str | _Blocks)]


class AnthropicTool(schema.FunctionIn):
    """A tool that the model may call; `input_schema` is a JSON schema. Prefixes are remembered without being asked."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    parameters: schema.Schema = Field(alias="input_schema")
    cache_control: dict[str, Any] | None = None


class BuiltInTool(schema.OtherTool):
    """A tool that only Anthropic's models know, as `web_search_20250305`."""

    type: str = Field(pattern="_")


class AnthropicChoice(Sent):
    """Whether a tool is called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool | None = None

    @property
    def chosen(self) -> str | schema.ChosenTool:
        """The same for chat completions."""
        if self.type == "tool":
            return schema.ChosenTool(type="function", name=self.name)
        return "required" if self.type == "any" else self.type


class OutputConfig(Sent):
    """The format of the text."""

    format: FlatSchemaFormat | None = None


class MessagesRequest(schema.Conversation):
    """POST /v1/messages."""

    messages: list[AnthropicMessage] = Field(min_length=1, max_length=schema.MAX_MESSAGES)
    system: Annotated[_Texts, or_text(_text, str | _Texts)] | None = None
    max_tokens: schema.Limit = None
    stop_sequences: list[str] | None = None
    tools: list[AnthropicTool | BuiltInTool] | None = None
    tool_choice: AnthropicChoice | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _thoughts(cls, value: Any) -> Any:
        """`thinking` as chat completions have it; where it is left to the model, it is left out."""
        if not isinstance(value, dict) or not isinstance(given := value.get("thinking"), dict):
            return value
        kind, budget = given.get("type"), given.get("budget_tokens")
        wanted = {"thinking": kind == "enabled"} if kind in ("enabled", "disabled") else {}
        return {"max_thinking_tokens": budget} | value | {"thinking": None} | wanted


def conversation(body: MessagesRequest) -> list[schema.MessageIn]:
    """The same as messages of chat completions, where results of tools are messages of their own."""
    system = [block for block in body.system or () if not block.text.startswith(_BILLING)]
    found = [_message("system", system)] if system else []
    names: dict[str, str] = {}
    for message in body.messages:
        shown: list[TextBlock | ImageBlock] = []
        calls, thoughts, results = [], "", False
        for block in message.content:
            if isinstance(block, ThinkingBlock):
                thoughts += block.thinking
            elif isinstance(block, CallBlock):
                names[block.id] = block.name
                function = schema.CalledFunction(name=block.name, arguments=json.dumps(block.input))
                calls.append(schema.ToolCallIn(id=block.id, function=function))
            elif isinstance(block, ResultBlock):
                if shown:
                    found.append(_message(message.role, shown))
                error = [TextBlock(type="text", text="Error:")] if block.is_error else []
                call = {"tool_call_id": block.tool_use_id, "name": names.get(block.tool_use_id)}
                found.append(_message("tool", [*error, *(block.content or ())], **call))
                shown, results = [], True
            else:
                shown.append(block)
        if shown or not results:
            found.append(_message(message.role, shown, tool_calls=calls or None, reasoning_content=thoughts or None))
    return found


def _message(role: Any, blocks: Sequence[TextBlock | ImageBlock], **more: Any) -> schema.MessageIn:
    # Nothing is checked again: all of it was, and images are long.
    return schema.MessageIn.model_construct(role=role, content=list(map(_part, blocks)), **more)


def _part(block: TextBlock | ImageBlock) -> PartIn:
    if isinstance(block, TextBlock):
        return TextPartIn.model_construct(type="text", text=block.text)
    source = block.source
    url = source.url if source.type == "url" else f"data:{source.media_type};base64,{source.data}"
    address = ImageUrl.model_construct(url=url)
    shown = {name: getattr(block, name) for name in ImageFields.model_fields}
    return ImagePartIn.model_construct(type="image_url", image_url=address, pages=block.pages, **shown)
