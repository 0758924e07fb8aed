"""What may stand in a request to chat completions and completions; everything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


class Strict(BaseModel):
    """Unknown fields are refused, and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, protected_namespaces=())


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_text_part(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_address(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class TextPartIn(Strict):
    """A stretch of text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where a picture is: a `data:` address, or another that the server's settings allow."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None


class ImagePartIn(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_address, json_schema_input_type=ImageUrl | str)]


PartIn = Annotated[TextPartIn | ImagePartIn, Field(discriminator="type")]
ContentIn = Annotated[list[PartIn] | None, BeforeValidator(_as_text_part, json_schema_input_type=str | list[PartIn])]


class CalledFunction(Strict):
    """The function of a call, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallIn(Strict):
    """A call that an assistant made earlier in the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class MessageIn(Strict):
    """One message of the conversation. Fields that only mirror an answer of a server may be there, empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: ContentIn = None
    name: str | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)


class FunctionIn(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolIn(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionIn


class NamedFunction(Strict):
    """A function by its name."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A named JSON schema. Answers always keep to it, `strict` or not."""

    name: str = Field("answer", pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object, or one that keeps to `schema`, as llama-server takes it."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class SchemaFormat(Strict):
    """JSON that keeps to a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


FormatIn = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Strict):
    """`include_usage` asks for one more event with the token counts; `include_obfuscation` has nothing to hide."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TemplateSwitches(Strict):
    """What the model's chat template is told."""

    enable_thinking: bool | None = None


class Common(Strict):
    """Fields that all three APIs share: sampling, extensions, and those without effect on the answer."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None

    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    ignore_eos: bool | None = None
    guard: bool | None = None
    max_seconds: float | None = None
    grammar: str | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


class Drawn(Common):
    """Fields of chat completions and completions."""

    n: int | None = Field(None, ge=1)
    stop: Annotated[list[str] | None, BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None)] = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Drawn):
    """POST /v1/chat/completions."""

    messages: list[MessageIn] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: FormatIn | None = None
    tools: list[ToolIn] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    modalities: list[Literal["text"]] | None = None
    thinking: bool | None = None
    chat_template_kwargs: TemplateSwitches | None = None


class CompletionRequest(Drawn):
    """POST /v1/completions: the text as it is, without the chat template; names of control tokens in it count."""

    prompt: Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = Field(
        min_length=1
    )
    logprobs: int | None = None
    echo: Literal[False] | None = None
