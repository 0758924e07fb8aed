"""From a request's fields to what the model is asked: sampling parameters, messages and tools, within the limits."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from opsin.core.errors import OpsinError
from opsin.core.request import Image, Prompt, SamplingParams
from opsin.core.settings import ServerSettings
from opsin.prompt import Content, Message, PromptBuilder
from opsin.server.errors import BadField, UnknownModel, at_most, field_error
from opsin.server.handler import Context
from opsin.server.model import ServedModel
from opsin.server.schema import (
    Choices,
    Common,
    Conversation,
    FlatSchemaFormat,
    FunctionIn,
    ImagePartIn,
    MessageIn,
    NamedFunction,
    ObjectFormat,
    SchemaFormat,
    TextFormat,
)
from opsin.server.security import is_loopback

_SEEDS = 2**32 - 1
_MAX_TOP_K = 2**31 - 1
_SAME = {
    "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "ignore_eos",
    "guard", "max_seconds", "grammar", "max_thinking_tokens",
}  # fmt: skip


def check_model(name: str | None, model: ServedModel, settings: ServerSettings) -> None:
    """Raise UnknownModel if only the served name is accepted: with strict_model, and away from loopback."""
    if name not in {None, model.name} and (settings.strict_model or not is_loopback(settings.host)):
        raise UnknownModel(str(name), model.name)


def sampling(
    body: Common, settings: ServerSettings, limit_name: str, max_tokens: int | None, **more: Any
) -> SamplingParams:
    """The parameters of a request; `more` are fields of SamplingParams that the caller made itself.

    What a request leaves out comes from the settings, then from SamplingParams. `limit_name` is the request's name for
    the limit on tokens. Raises BadField.
    """
    values = {"guard": settings.guard} | body.model_dump(include=_SAME, exclude_none=True)
    values |= {name: value for name, value in more.items() if value is not None}
    values["max_tokens"] = settings.max_tokens if max_tokens is None else max_tokens
    # Any number is a seed; -1 chooses one at random, as with llama-server.
    values["seed"] = None if body.seed is None or body.seed == -1 else body.seed % _SEEDS
    if isinstance(body, Choices):
        values |= {"stop": tuple(body.stop or ()), "logit_bias": _bias(body, settings)}
        at_most(settings.max_stop, len(values["stop"]), "strings", "stop")
    if settings.max_seconds is not None:
        values["max_seconds"] = min(settings.max_seconds, values.get("max_seconds", settings.max_seconds))
    if values.get("top_k", 0) > _MAX_TOP_K:
        raise BadField(f"top_k is more than {_MAX_TOP_K}: send a smaller one, or 0 to switch it off.", "top_k")
    if (grammar := values.get("grammar")) is not None:
        at_most(settings.max_schema_bytes, len(grammar.encode("utf-8", "replace")), "bytes", "grammar")
        if values.get("json_schema") is not None:
            raise BadField("grammar cannot be used with response_format or a forced tool: leave one out.", "grammar")
    try:
        return SamplingParams(**values)
    except ValidationError as error:
        raise field_error(error, {"max_tokens": limit_name, "logprobs": "top_logprobs"}) from None


def _bias(body: Choices, settings: ServerSettings) -> dict[int, float]:
    bias = body.logit_bias or {}
    at_most(settings.max_logit_bias, len(bias), "tokens", "logit_bias")
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise BadField("logit_bias names a token that is not a number: use token ids.", "logit_bias") from None


def choices(params: SamplingParams, n: int | None, settings: ServerSettings) -> list[SamplingParams]:
    """The parameters of each of `n` choices: the same, but with seeds of their own. Raises BadField."""
    n = n or 1
    at_most(settings.max_n, n, "choices", "n")
    if params.seed is None:
        return [params] * n
    return [params.model_copy(update={"seed": (params.seed + i) % _SEEDS}) for i in range(n)]


def wants_usage(body: Choices) -> bool:
    """Whether a stream ends with the token counts. Raises BadField if there is no stream."""
    if body.stream_options is not None and not body.stream:
        raise BadField("stream_options needs stream: set it to true, or leave stream_options out.", "stream_options")
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def top_logprobs(top: int | None, settings: ServerSettings, param: str) -> int | None:
    """How many alternatives are shown for each token. Raises BadField over the limit."""
    if top is not None and not 0 <= top <= settings.max_top_logprobs:
        raise BadField(f"{param} is {top}: 0 to {settings.max_top_logprobs} are possible here.", param)
    return top


async def build_prompt(
    body: Conversation, messages: Sequence[MessageIn], tools: ToolPlan, model: ServedModel, context: Context
) -> Prompt:
    """The prompt of a conversation; its images are loaded side by side.

    Raises BadField for too many images or too much text, BadPrompt, and what loading an image raises.
    """
    _check_size(messages, context.settings)
    loads = [
        asyncio.ensure_future(_load(part, f"messages[{i}].content[{j}].image_url", context))
        for i, message in enumerate(messages)
        for j, part in enumerate(message.content or ())
        if isinstance(part, ImagePartIn)
    ]
    try:
        images = iter(await asyncio.gather(*loads))
    finally:
        for load in loads:
            load.cancel()
    conversation = tools.messages([_message(message, images) for message in messages])
    # In a thread: the template of an unknown model may take its time.
    return await asyncio.to_thread(model.prompts.build, conversation, tools=tools.told, thinking=body.wants_thinking)


async def _load(part: ImagePartIn, param: str, context: Context) -> Image:
    try:
        return await context.images.load(part.image_url.url, detail=part.detail or part.image_url.detail)
    except OpsinError as error:
        error.param = param  # type: ignore[attr-defined] # the client wants to know which of its images it was
        raise


def _check_size(messages: Sequence[MessageIn], settings: ServerSettings) -> None:
    parts = [part for message in messages for part in message.content or ()]
    texts = [part.text for part in parts if not isinstance(part, ImagePartIn)]
    at_most(settings.max_images, len(parts) - len(texts), "images", "messages")
    texts += [message.reasoning_content or "" for message in messages]
    texts += [call.function.arguments for message in messages for call in message.tool_calls or ()]
    at_most(settings.max_prompt_chars, sum(map(len, texts)), "characters", "messages")


def _message(message: MessageIn, images: Iterator[Image]) -> Message:
    content: list[Content] = [
        next(images) if isinstance(part, ImagePartIn) else part.text for part in message.content or ()
    ]
    calls = []
    for call in message.tool_calls or ():
        arguments: Any = call.function.arguments
        try:  # templates want an object
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict) and not is_deep(parsed):
            arguments = parsed
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id, "type": "function", "function": function})
    return Message(
        "system" if message.role == "developer" else message.role,
        content[0] if len(content) == 1 and isinstance(content[0], str) else content or "",
        reasoning=message.reasoning_content,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


MAX_DEPTH = 64

_OPENERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)|(?:\[TOOL_CALLS\]|<\|python_tag\|>)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How a request's tools reach the model.

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

    def reader(self) -> CallReader | None:
        """A reader for one answer; None if no call is looked for."""
        return CallReader(self.names, whole=self.schema is not None) if self.names else None


def plan_tools(
    functions: Sequence[FunctionIn],
    choice: str | NamedFunction | None,
    prompts: PromptBuilder,
    settings: ServerSettings,
) -> ToolPlan:
    """How a request's tools are handled. Raises BadField."""
    by_name = {function.name: function for function in functions}
    if not by_name:
        if choice not in (None, "none", "auto"):
            raise BadField("tool_choice asks for a call, but there are no tools: give some.", "tool_choice")
        return ToolPlan()
    _check_depth([function.parameters for function in functions], "tools")
    shown = {
        name: function.model_dump(exclude_none=True, exclude={"strict", "type"}) for name, function in by_name.items()
    }
    told = [{"type": "function", "function": function} for function in shown.values()]
    at_most(settings.max_schema_bytes, len(json.dumps(told)), "bytes", "tools")
    if choice == "none":
        return ToolPlan()
    if choice in (None, "auto"):
        if not prompts.knows_tools:
            raise BadField(
                "This model's chat template has no place for tools, so the model cannot decide by itself whether to "
                'call one: set tool_choice to "required" or name a function, or leave tools out.',
                "tools",
            )
        return ToolPlan(told=told, names=frozenset(by_name))
    if isinstance(choice, NamedFunction):
        if choice.name not in by_name:
            raise BadField(f"tool_choice names {choice.name[:64]!r}, which is not among tools.", "tool_choice")
        by_name = {choice.name: by_name[choice.name]}
    plan = ToolPlan(told=told, schema=_call_schema(list(by_name.values())), names=frozenset(by_name))
    if prompts.knows_tools:
        return plan
    lines = [json.dumps(shown[name], ensure_ascii=False) for name in by_name]
    shape = '{"name": the function\'s name, "arguments": an object with its arguments}'
    instructions = "\n".join(("Call one of these functions. Answer with JSON alone:", shape, *lines))
    return ToolPlan(instructions=instructions, schema=plan.schema, names=plan.names)


def schema_of(wanted: TextFormat | ObjectFormat | SchemaFormat | FlatSchemaFormat | None, limit: int) -> str | None:
    """The JSON schema that a response format asks for, of at most `limit` bytes. Raises BadField."""
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    schema = wanted.json_schema.schema_ if isinstance(wanted, SchemaFormat) else wanted.schema_
    _check_depth(schema, "response_format")
    text = json.dumps(schema or {"type": "object"})
    at_most(limit, len(text), "bytes", "response_format")
    return text


def is_deep(value: Any) -> bool:
    """Whether JSON is nested so deeply that code which walks through it might hit the recursion limit."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level, depth = [item for items in inner for item in items], depth + 1
    return bool(level)


def _check_depth(value: Any, param: str) -> None:
    if is_deep(value):
        raise BadField(f"{param} is nested more than {MAX_DEPTH} deep: make it flatter.", param)


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


class CallReader:
    """Takes an answer piece by piece and separates its text from its calls.

    With `whole` the answer is one JSON object and nothing else. Otherwise calls are looked for in the forms that
    models are trained on: JSON inside <tool_call> tags, a list after [TOOL_CALLS], and an answer that is a JSON object
    with the name of a known function. What turns out not to be a call is text. From the first sign of a call on,
    everything is held back until the end.
    """

    def __init__(self, names: frozenset[str], *, whole: bool = False) -> None:
        self._names = names
        self._holds = whole
        self._held = ""
        self._said = False
        self.calls: list[dict[str, Any]] = []
        """The calls that were found, as chat completions write them."""

    def feed(self, text: str) -> str:
        """Take text; return what is certainly not part of a call."""
        self._held += text
        if self._holds or (not self._said and self._held.lstrip()[:1] in {"", "{"}):
            return ""
        start = min((at for tag in _OPENERS if (at := self._held.find(tag)) >= 0), default=-1)
        self._holds = start >= 0
        if not self._holds:
            start = len(self._held) - _tail(self._held)
        text, self._held = self._held[:start], self._held[start:]
        self._said = self._said or bool(text.strip())
        return text

    def finish(self) -> str:
        """The answer is over: return what was held back and is not a call."""
        held, self._held = self._held, ""
        if not self._said and self._read(held):
            return ""
        text = _CALL.sub(lambda found: "" if self._read(found[1] or found[2] or "") else found[0], held)
        return text if text.strip() or not self.calls else ""

    def _read(self, text: str) -> bool:
        """Read calls from JSON text; False if it holds none, or anything else."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        items = value if isinstance(value, list) else [value]
        if not items or not all(
            isinstance(item, Mapping) and isinstance(item.get("name"), str) and item["name"] in self._names
            for item in items
        ):
            return False
        for item in items:
            arguments = item.get("arguments", item.get("parameters", {}))
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            function = {"name": item["name"], "arguments": arguments}
            self.calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return True


def _tail(text: str) -> int:
    """How many characters at the end may be the start of a tag."""
    lengths = range(min(max(map(len, _OPENERS)) - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(tag.startswith(text[-n:]) for tag in _OPENERS)), 0)
