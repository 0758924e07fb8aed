"""What a request to chat completions and completions may contain, and what it becomes: parameters, and tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from opsin.core.request import SamplingParams
from opsin.core.settings import ServerSettings
from opsin.prompt import Message, PromptBuilder
from opsin.server.errors import BadField

NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
MAX_MESSAGES = MAX_PARTS = 1_000
MAX_DEPTH = 64


class Strict(BaseModel):
    """Unknown fields are refused, and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, protected_namespaces=())


def or_text(make: Callable[[str], Any], accepted: Any) -> BeforeValidator:
    """Plain text is short for what `make` makes of it; `accepted` is what the API document shows."""
    return BeforeValidator(
        lambda value: make(value) if isinstance(value, str) else value, json_schema_input_type=accepted
    )


def is_deep(value: Any) -> bool:
    """Whether JSON is nested so deeply that code which walks through it might hit the recursion limit."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level, depth = [item for items in inner for item in items], depth + 1
    return bool(level)


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    if is_deep(schema):
        raise ValueError(f"nested more than {MAX_DEPTH} deep: make it flatter")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_shallow)]


# Where pydantic has to check a text, it refuses halves of characters (lone surrogates), too.
WholeText = Annotated[str, Field(min_length=0)]


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


class ImagePartIn(Strict):
    """An image, as chat completions (`image_url`) or the Responses API (`input_image`) write it."""

    type: Literal["image_url", "input_image"]
    image_url: Annotated[ImageUrl, or_text(lambda url: {"url": url}, ImageUrl | str)]
    detail: Literal["auto", "low", "high"] | None = None
    file_id: None = None


PartIn = Annotated[TextPartIn | ImagePartIn, Field(discriminator="type")]
Parts = Annotated[list[PartIn], Field(max_length=MAX_PARTS)]
ContentIn = Annotated[Parts, or_text(lambda text: [{"type": "text", "text": text}], str | Parts)]


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
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    """What all tools have; functions are the only kind."""

    type: Literal["function"]


class ToolIn(Tool):
    """A function that the model may call, as chat completions write it."""

    function: FunctionIn


class JsonSchema(Strict):
    """A named JSON schema. Answers always keep to it, `strict` or not."""

    name: str = Field("answer", pattern=NAME)
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object, or one that keeps to `schema`, as llama-server takes it."""

    type: Literal["json_object"]
    schema_: Schema | None = Field(None, alias="schema")


class SchemaFormat(Strict):
    """JSON that keeps to a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


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

    top_k: Annotated[int, Field(le=2**31 - 1)] | None = None
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
    stop: Annotated[list[str] | None, or_text(lambda text: [text], str | list[str] | None)] = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None


class ChatRequest(Choices, Conversation):
    """POST /v1/chat/completions."""

    messages: list[MessageIn] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: list[ToolIn] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolIn | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Choices):
    """POST /v1/completions: the text as it is, without the chat template; names of control tokens in it count."""

    prompt: Annotated[list[WholeText], or_text(lambda text: [text], str | list[str])] = Field(min_length=1)
    logprobs: int | None = Field(None, ge=0)
    echo: Literal[False] | None = None


def at_most(limit: int, count: int, noun: str, param: str) -> None:
    """Raise BadField if a request has more of something than it may have."""
    if count > limit:
        raise BadField(f"{param}: {count:,} {noun}, and {limit:,} are the limit: send less.", param)


_SEEDS = 2**32 - 1
# What a request says in the same words; the rest is made below.
_SAME = set(SamplingParams.model_fields) - {"logprobs", "max_tokens", "seed", "stop"}


def sampling(body: Common, settings: ServerSettings, max_tokens: int | None, **more: Any) -> SamplingParams:
    """The parameters of a request; `more` are fields of SamplingParams that the caller made itself.

    What a request leaves out comes from the settings, then from SamplingParams. Raises BadField and
    RequestValidationError.
    """
    values = {"guard": settings.guard} | body.model_dump(include=_SAME, exclude_none=True)
    values |= {name: value for name, value in more.items() if value is not None}
    values["max_tokens"] = settings.max_tokens if max_tokens is None else max_tokens
    # Any number is a seed; -1 chooses one at random, as with llama-server.
    values["seed"] = None if body.seed is None or body.seed == -1 else body.seed % _SEEDS
    if isinstance(body, Choices):
        values["stop"] = tuple(body.stop or ())
        at_most(settings.max_stop, len(values["stop"]), "strings", "stop")
        at_most(settings.max_logit_bias, len(body.logit_bias or ()), "tokens", "logit_bias")
    if settings.max_seconds is not None:
        values["max_seconds"] = min(settings.max_seconds, values.get("max_seconds", settings.max_seconds))
    if (grammar := values.get("grammar")) is not None:
        at_most(settings.max_schema_bytes, len(grammar.encode("utf-8", "replace")), "bytes", "grammar")
        if values.get("json_schema") is not None:
            raise BadField("grammar cannot be used with response_format or a forced tool: leave one out.", "grammar")
    try:
        return SamplingParams(**values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def choices(params: SamplingParams, n: int | None, settings: ServerSettings) -> list[SamplingParams]:
    """The parameters of each of `n` choices: the same, but with seeds of their own. Raises BadField."""
    n = n or 1
    at_most(settings.max_n, n, "choices", "n")
    if params.seed is None:
        return [params] * n
    return [params.model_copy(update={"seed": (params.seed + i) % _SEEDS}) for i in range(n)]


def schema_of(wanted: TextFormat | ObjectFormat | SchemaFormat | JsonSchema | None, limit: int) -> str | None:
    """The JSON schema that a response format asks for, of at most `limit` bytes. Raises BadField."""
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    schema = wanted.json_schema.schema_ if isinstance(wanted, SchemaFormat) else wanted.schema_
    text = json.dumps(schema or {"type": "object"})
    at_most(limit, len(text), "bytes", "response_format")
    return text


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How a request's tools reach the model; without any, or where none may be called, nothing is changed.

    `told` goes to the chat template; `instructions` go into the system message if the template has no place for tools;
    the whole answer keeps to `schema`. `names` are the functions that may be called; if empty, no call is looked for.
    """

    told: list[dict[str, Any]] | None = None
    instructions: str | None = None
    schema: str | None = None
    names: frozenset[str] = frozenset()

    def messages(self, messages: list[Message]) -> list[Message]:
        """The conversation, with the instructions about tools in its system message."""
        if self.instructions is None:
            return messages
        if messages[0].role == "system":
            return [Message("system", [*messages[0].parts, self.instructions]), *messages[1:]]
        return [Message("system", self.instructions), *messages]


def plan_tools(
    functions: Sequence[FunctionIn], choice: str | FunctionIn | None, prompts: PromptBuilder, settings: ServerSettings
) -> ToolPlan:
    """How a request's tools are handled. Raises BadField."""
    if choice == "none" or (choice in (None, "auto") and not functions):
        return ToolPlan()
    by_name = {function.name: function for function in functions}
    if not by_name:
        raise BadField("tool_choice asks for a call, but there are no tools: give some.", "tool_choice")
    shown = {
        name: function.model_dump(exclude_none=True, exclude={"strict", "type"}) for name, function in by_name.items()
    }
    told = [{"type": "function", "function": function} for function in shown.values()]
    at_most(settings.max_schema_bytes, len(json.dumps(told)), "bytes", "tools")
    if choice in (None, "auto"):
        if not prompts.knows_tools:
            raise BadField(
                "This model's chat template has no place for tools, so the model cannot decide by itself whether to "
                'call one: set tool_choice to "required" or name a function, or leave tools out.',
                "tools",
            )
        return ToolPlan(told=told, names=frozenset(by_name))
    if isinstance(choice, FunctionIn):
        if choice.name not in by_name:
            raise BadField(f"tool_choice names {choice.name[:64]!r}, which is not among tools.", "tool_choice")
        by_name = {choice.name: by_name[choice.name]}
    schema, names = _call_schema(list(by_name.values())), frozenset(by_name)
    if prompts.knows_tools:
        return ToolPlan(told=told, schema=schema, names=names)
    lines = [json.dumps(shown[name], ensure_ascii=False) for name in by_name]
    shape = '{"name": the function\'s name, "arguments": an object with its arguments}'
    instructions = "\n".join(("Call one of these functions. Answer with JSON alone:", shape, *lines))
    return ToolPlan(instructions=instructions, schema=schema, names=names)


def _call_schema(functions: Sequence[FunctionIn]) -> str:
    """The JSON schema of a call of one of the functions."""
    calls, shared = [], {}
    for i, function in enumerate(functions):
        arguments = function.parameters or {"type": "object"}
        text = json.dumps(arguments)
        if '"$ref"' in text:
            # References count from the root, which moves when the schema becomes a part of another.
            shared[f"f{i}"] = json.loads(text.replace('"$ref": "#', f'"$ref": "#/$defs/f{i}'))
            arguments = {"$ref": f"#/$defs/f{i}"}
        calls.append({
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return json.dumps({**schema, "$defs": shared} if shared else schema)


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8. Lone surrogates, which a client may have sent in a name, become question marks."""
    return _JSON.encode(value).encode("utf-8", "replace")
