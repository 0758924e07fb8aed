"""What a request to each of the three APIs may contain. Other fields are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
MAX_MESSAGES = MAX_PARTS = 1_000
MAX_ADDRESS = 8_192
"""Characters of an image's address. `data:` addresses are bounded by the size of the body."""


class Strict(BaseModel):
    """Unknown fields are refused, and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, protected_namespaces=())


def _or_text(make: Callable[[str], Any], accepted: Any) -> BeforeValidator:
    """Plain text is short for what `make` makes of it; `accepted` is what the API document shows."""
    return BeforeValidator(
        lambda value: make(value) if isinstance(value, str) else value, json_schema_input_type=accepted
    )


class TextPartIn(Strict):
    """Text. Parts of an earlier answer may be sent back as they came."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = None


class ImageUrl(Strict):
    """Where an image is: a `data:` address, or another kind that the server's settings allow."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None

    @field_validator("url")
    @classmethod
    def _short_address(cls, url: str) -> str:
        if len(url) > MAX_ADDRESS and url[:16].strip()[:5].lower() != "data:":
            raise ValueError(f"the address has {len(url):,} characters, the limit is {MAX_ADDRESS:,}")
        return url


class ImagePartIn(Strict):
    """An image, as chat completions (`image_url`) or the Responses API (`input_image`) write it."""

    type: Literal["image_url", "input_image"]
    image_url: Annotated[ImageUrl, _or_text(lambda url: {"url": url}, ImageUrl | str)]
    detail: Literal["auto", "low", "high"] | None = None
    file_id: None = None


PartIn = Annotated[TextPartIn | ImagePartIn, Field(discriminator="type")]
Parts = Annotated[list[PartIn], Field(max_length=MAX_PARTS)]
ContentIn = Annotated[Parts, _or_text(lambda text: [{"type": "text", "text": text}], str | Parts)]


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
    """One message of the conversation. Fields that only mirror an earlier answer may be there, empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: ContentIn | None = None
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


class Tool(Strict):
    """What all tools have; functions are the only kind."""

    type: Literal["function"]


class ToolIn(Tool):
    """A function that the model may call, as chat completions write it."""

    function: FunctionIn


class FlatTool(FunctionIn, Tool):
    """A function that the model may call, as the Responses API writes it."""


class NamedFunction(Strict):
    """A function by its name."""

    name: str


class NamedTool(Tool):
    """The function that must be called, as chat completions write it."""

    function: NamedFunction


class FlatNamedTool(NamedFunction, Tool):
    """The function that must be called, as the Responses API writes it."""


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


class FlatSchemaFormat(JsonSchema):
    """JSON that keeps to a schema, as the Responses API writes it."""

    type: Literal["json_schema"]


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
    seed: int | None = None
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


class Conversation(Common):
    """Fields of the two APIs that use the chat template."""

    thinking: bool | None = None
    max_thinking_tokens: int | None = None
    chat_template_kwargs: TemplateSwitches | None = None

    @property
    def wants_thinking(self) -> bool | None:
        """Thinking on or off; None leaves it to the template."""
        switches = self.chat_template_kwargs
        return self.thinking if switches is None or switches.enable_thinking is None else switches.enable_thinking


class Choices(Common):
    """Fields that chat completions and completions share."""

    n: int | None = Field(None, ge=1)
    stop: Annotated[list[str] | None, _or_text(lambda text: [text], str | list[str] | None)] = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Choices, Conversation):
    """POST /v1/chat/completions."""

    messages: list[MessageIn] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: list[ToolIn] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Choices):
    """POST /v1/completions: the text as it is, without the chat template; names of control tokens in it count."""

    prompt: Annotated[list[str], _or_text(lambda text: [text], str | list[str])] = Field(min_length=1)
    logprobs: int | None = None
    echo: Literal[False] | None = None

    @field_validator("prompt")
    @classmethod
    def _whole_unicode(cls, prompt: list[str]) -> list[str]:
        try:
            "".join(prompt).encode()
        except UnicodeEncodeError:
            raise ValueError("half a character (a lone surrogate): send whole Unicode text") from None
        return prompt


class Item(Strict):
    """What an item of an earlier response carries when it is sent back."""

    id: str | None = None
    status: str | None = None


class InputMessage(MessageIn, Item):
    """A message; earlier answers may be sent back as they came."""

    type: Literal["message"] = "message"
    content: ContentIn


class InputCall(Item):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputCallOutput(Item):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: ContentIn


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


class TextOptions(Strict):
    """The format of the text."""

    format: Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None


class ResponsesRequest(Conversation):
    """POST /v1/responses. Nothing is stored: a conversation is sent whole each time."""

    input: Annotated[
        list[InputItem], _or_text(lambda text: [{"role": "user", "content": text}], str | list[InputItem])
    ] = Field(min_length=1, max_length=MAX_MESSAGES)
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextOptions | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    background: Literal[False] | None = None
    include: list[Any] | None = Field(None, max_length=0)

    def messages(self) -> list[MessageIn]:
        """The conversation as messages of chat completions."""
        found: list[MessageIn] = []
        if self.instructions:
            found.append(MessageIn.model_validate({"role": "system", "content": self.instructions}))
        for item in self.input:
            if isinstance(item, InputMessage):
                found.append(item)
            elif isinstance(item, InputCallOutput):
                found.append(MessageIn(role="tool", content=item.output, tool_call_id=item.call_id))
            elif isinstance(item, InputCall):
                call = ToolCallIn(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
                if found and found[-1].role == "assistant":
                    found[-1].tool_calls = [*(found[-1].tool_calls or ()), call]
                else:
                    found.append(MessageIn(role="assistant", tool_calls=[call]))
        return found
