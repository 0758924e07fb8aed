"""What a request to chat completions and completions may contain, and the parameters that it becomes."""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, ValidationError, model_validator

from opsin.core.files import read_table
from opsin.core.request import SamplingParams
from opsin.core.settings import ServerSettings
from opsin.server.choices import ChoicesFormat, check_alone, labels_of
from opsin.server.errors import BadField
from opsin.server.parts import ContentIn, History, ImageFields, Sent, or_text

NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
MAX_MESSAGES = 1_000
MAX_DEPTH = 64


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


def _arguments(value: Any) -> Any:
    """Arguments of a call as JSON text: none are an empty object, and an object is as good as its text."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, str):
        try:
            json.loads(value or "{}")
        except (ValueError, RecursionError):
            raise ValueError("not JSON: send the arguments of the call whole") from None
        return value or "{}"
    return value


class CalledFunction(History):
    """The function of a call, and its arguments as JSON text."""

    name: str
    arguments: Annotated[str, BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any])] = "{}"


class ToolCallIn(History):
    """A call that an assistant made earlier in the conversation."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class MessageIn(History):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: ContentIn | None = None
    name: str | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, validation_alias=AliasChoices("reasoning_content", "reasoning"))


class FunctionIn(Sent):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Sent):
    """What all functions have; tools of other kinds are left out where the model may choose."""

    type: Literal["function"]


class ToolIn(Tool):
    """A function that the model may call, as chat completions write it."""

    function: FunctionIn


def _other(kind: str) -> str:
    if kind == "function":
        raise ValueError("not a function as it should be")
    return kind


class OtherTool(Sent):
    """A tool that only OpenAI has, as `web_search`."""

    type: Annotated[str, AfterValidator(_other)]

    def without_effect(self) -> Iterable[str]:
        """It is left out as a whole."""
        return ("type",)


AnyTool = ToolIn | FunctionIn | OtherTool


class ChosenFunction(Sent):
    """The name of the function to call."""

    name: str


class ChosenTool(Tool):
    """The function to call, as chat completions and the Responses API write it."""

    name: str = ""
    function: ChosenFunction | None = None

    @property
    def called(self) -> str:
        """The function's name."""
        return self.function.name if self.function else self.name


class JsonSchema(Sent):
    """A named JSON schema. Answers always keep to it, `strict` or not."""

    name: str = "answer"
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Sent):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(Sent):
    """Any JSON object, or one that keeps to `schema`, as llama-server (or `value`, as Hugging Face) takes it."""

    type: Literal["json_object", "json"]
    schema_: Schema | None = Field(None, validation_alias=AliasChoices("schema", "value"), serialization_alias="schema")


class SchemaFormat(Sent):
    """JSON that keeps to a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """The schema may stand in the format itself, as llama-server takes it."""
        if not isinstance(value, dict) or "schema" not in value:
            return value
        return {"type": value.get("type"), "json_schema": {name: value[name] for name in value if name != "type"}}


Format = TextFormat | ObjectFormat | SchemaFormat | ChoicesFormat


class StreamOptions(Sent):
    """`include_usage` asks for one more event with the token counts."""

    include_usage: bool | None = None


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Limit = Annotated[int | None, Field(ge=1), BeforeValidator(lambda value: None if value == -1 else _whole(value))]
"""A number of tokens; -1 is as good as none."""
Thinking = Annotated[
    bool,
    BeforeValidator(
        lambda value: value.get("type") != "disabled" if isinstance(value, dict) else value,
        json_schema_input_type=bool | dict[str, Any],
    ),
]
_FIELDS = read_table(__file__, "fields.toml")
_ALIASES: dict[str, str] = _FIELDS["aliases"]
_REFUSED = {name: advice for advice, names in _FIELDS["refused"].items() for name in names}
# Of fields that another API has, those whose neglect changes an answer little enough, or not at all.
_HINTS = frozenset(("logprobs", "modalities", "n", "n_probs", "stream_options", "top_logprobs"))


class Common(Sent):
    """Fields that all APIs share: sampling, and extensions. Those without effect here are ignored and named."""

    model: str | None = None
    stream: bool | None = None
    seed: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None

    top_k: Annotated[Whole, Field(le=2**31 - 1)] | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    penalty_last_n: Whole | None = None
    min_tokens: Whole | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    guard: bool | None = None
    max_seconds: float | None = None
    grammar: str | None = None
    confidence: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        """Other servers' names for the same fields."""
        if not isinstance(value, dict):
            return value
        others = {ours: value[theirs] for theirs, ours in _ALIASES.items() if theirs in value}
        return others | {key: one for key, one in value.items() if key not in _ALIASES and one is not None}


class Conversation(Common, ImageFields):
    """Fields of the two APIs that use the chat template, which `chat_template_kwargs` go to."""

    thinking: Thinking | None = None
    max_thinking_tokens: Whole | None = None
    boxes: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @property
    def wants_thinking(self) -> bool | None:
        """Thinking on or off; None leaves it to the template."""
        wanted = (self.chat_template_kwargs or {}).get("enable_thinking", self.thinking)
        return False if wanted is None and self.reasoning_effort == "none" else wanted

    def without_effect(self) -> Iterable[str]:
        """An effort between none and all is no choice here."""
        return () if self.reasoning_effort in {None, "none"} else ("reasoning_effort",)


class Choices(Common):
    """Fields that chat completions and completions share."""

    n: Whole | None = Field(None, ge=1)
    best_of: Literal[1] | None = None
    stop: Annotated[list[str] | None, or_text(lambda text: [text], str | list[str] | None)] = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None
    max_tokens: Limit = None
    n_probs: Whole | None = Field(None, ge=0)
    response_format: Annotated[Format, Field(discriminator="type")] | None = None
    json_schema: Schema | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Choices, Conversation):
    """POST /v1/chat/completions."""

    messages: list[MessageIn] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Limit = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0)
    tools: list[ToolIn | OtherTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Choices):
    """POST /v1/completions: the text as it is, without the chat template; names of control tokens in it count."""

    prompt: Annotated[list[WholeText], or_text(lambda text: [text], str | list[str])] = Field(min_length=1)
    logprobs: Whole | None = Field(None, ge=0)
    echo: Literal[False] | None = None


_ELSEWHERE = frozenset((*ChatRequest.model_fields, *CompletionRequest.model_fields)) - _HINTS


def ignored(value: Any, path: str = "") -> Iterator[str]:
    """The fields of a request that have no effect, as they are not known or only hints.

    Raises BadField for fields whose neglect would make the answer wrong.
    """
    if isinstance(value, Sent) and not isinstance(value, History):
        for name in value.model_extra or ():
            if not path and (name in _REFUSED or name in _ELSEWHERE):
                advice = _REFUSED.get(name, "another API has it, so use that, or leave it out")
                raise BadField(f"The field {name!r} is not supported here: {advice}.", name)
            yield f"{path}{name}"
        yield from (f"{path}{name}" for name in value.without_effect())
        for name in value.model_fields_set:
            yield from ignored(getattr(value, name), f"{path}{name}.")
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from ignored(one, f"{path.rstrip('.')}[{index}].")


def at_most(limit: int, count: int, noun: str, param: str) -> None:
    """Raise BadField if a request has more of something than it may have."""
    if count > limit:
        raise BadField(f"{param}: {count:,} {noun}, and {limit:,} are the limit: send less.", param)


_SEEDS = 2**32 - 1
# What a request says in the same words; the rest is made below.
_SAME = set(SamplingParams.model_fields) - {"json_schema", "logprobs", "max_tokens", "seed", "stop"}


def sampling(
    body: Common,
    settings: ServerSettings,
    max_tokens: int | None,
    wanted: Format | JsonSchema | dict[str, Any] | None,
    forced: str | None = None,
    **more: Any,
) -> SamplingParams:
    """The parameters of a request; `more` are fields of SamplingParams that the caller made itself.

    The answer has the format `wanted`, or the schema of a `forced` call. What a request leaves out comes from the
    settings, then from SamplingParams. Raises BadField and RequestValidationError.
    """
    more["json_schema"] = forced or _schema_of(wanted, settings.max_schema_bytes)
    if isinstance(wanted, ChoicesFormat):
        more |= labels_of(wanted)
    if isinstance(body, Conversation):
        more["thinking"] = body.wants_thinking
    # A field that the API does not have is ignored, also if SamplingParams has one of its name.
    values = {"guard": settings.guard} | body.model_dump(include=_SAME & {*type(body).model_fields}, exclude_none=True)
    values |= {name: value for name, value in more.items() if value is not None}
    values["max_tokens"] = settings.max_tokens if max_tokens is None else max_tokens
    # Any number is a seed; -1 chooses one at random, as with llama-server.
    values["seed"] = None if body.seed is None or body.seed == -1 else body.seed % _SEEDS
    # Zero means the most likely token alone, and -1 any number of them.
    values |= {name: max(values[name], least) for name, least in (("top_p", 1e-6), ("top_k", 0)) if name in values}
    if isinstance(body, Choices):
        values["stop"] = tuple(filter(None, body.stop or ()))
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


def choices(
    body: Choices, params: SamplingParams, settings: ServerSettings, *, tools: bool = False
) -> list[SamplingParams]:
    """The parameters of each of `n` choices: the same, but with seeds of their own. Raises BadField."""
    if params.labels:
        check_alone(body.n, tools=tools, schema=body.json_schema)
    n = body.n or 1
    at_most(settings.max_n, n, "choices", "n")
    if params.seed is None:
        return [params] * n
    return [params.model_copy(update={"seed": (params.seed + i) % _SEEDS}) for i in range(n)]


def _schema_of(wanted: Format | JsonSchema | dict[str, Any] | None, limit: int) -> str | None:
    """The JSON schema that a response format asks for, of at most `limit` bytes. Raises BadField."""
    if wanted is None or isinstance(wanted, (TextFormat, ChoicesFormat)):
        return None
    if not isinstance(wanted, dict):
        wanted = (wanted.json_schema if isinstance(wanted, SchemaFormat) else wanted).schema_
    text = json.dumps(wanted or {"type": "object"})
    at_most(limit, len(text), "bytes", "response_format")
    return text


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8. Lone surrogates, which a client may have sent in a name, become question marks."""
    return _JSON.encode(value).encode("utf-8", "replace")


def loads(text: str) -> Any:
    """What JSON text says; None if it cannot be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
