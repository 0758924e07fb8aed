"""From a request's fields to sampling parameters and messages, within the limits of the server's settings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from opsin.core.errors import OpsinError
from opsin.core.image import Image
from opsin.core.prompt import Prompt
from opsin.core.sampling import SamplingParams
from opsin.core.server_settings import ServerSettings
from opsin.prompt import Content, Message
from opsin.server.context import Context
from opsin.server.errors import BadField, UnknownModel, at_most, field_error
from opsin.server.model import ServedModel
from opsin.server.schema import (
    IMAGE_PARTS,
    Choices,
    Common,
    Conversation,
    ImagePartIn,
    InputImage,
    MessageIn,
    ToolCallIn,
)
from opsin.server.security import is_loopback
from opsin.server.tools import ToolPlan, is_deep

_SEEDS = 2**32 - 1
_MAX_TOP_K = 2**31 - 1
_SAME = {
    "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "ignore_eos",
    "guard", "max_seconds", "grammar", "max_thinking_tokens",
}  # fmt: skip


def check_model(name: str | None, model: ServedModel, settings: ServerSettings) -> None:
    """Raise UnknownModel if only the served name is accepted: with strict_model, and away from loopback."""
    if name is None or name == model.name or not (settings.strict_model or not is_loopback(settings.host)):
        return
    raise UnknownModel(f"The model {name[:100]!r} is not served here: ask for {model.name!r}.", "model")


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
    # Any number is a seed; -1 draws one, as with llama-server.
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
    if n == 1 or params.seed is None:
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
        if isinstance(part, IMAGE_PARTS)
    ]
    try:
        images = iter(await asyncio.gather(*loads))
    finally:
        for load in loads:
            load.cancel()
    conversation = tools.messages([_message(message, images) for message in messages])
    # In a thread: the template of an unknown model may take its time.
    return await asyncio.to_thread(model.prompts.build, conversation, tools=tools.told, thinking=body.wants_thinking)


async def _load(part: ImagePartIn | InputImage, param: str, context: Context) -> Image:
    detail = part.detail if isinstance(part, InputImage) else part.image_url.detail
    try:
        return await context.images.load(part.image_url.url, detail=detail)
    except OpsinError as error:
        error.param = param  # type: ignore[attr-defined] # the client wants to know which of its images it was
        raise


def _check_size(messages: Sequence[MessageIn], settings: ServerSettings) -> None:
    parts = [part for message in messages for part in message.content or ()]
    n_images = sum(isinstance(part, IMAGE_PARTS) for part in parts)
    at_most(settings.max_images, n_images, "images", "messages")
    n_chars = sum(len(part.text) for part in parts if not isinstance(part, IMAGE_PARTS))
    n_chars += sum(len(message.reasoning_content or "") for message in messages)
    n_chars += sum(len(call.function.arguments) for message in messages for call in message.tool_calls or ())
    at_most(settings.max_prompt_chars, n_chars, "characters", "messages")


def _message(message: MessageIn, images: Iterator[Image]) -> Message:
    content: list[Content] = [
        next(images) if isinstance(part, IMAGE_PARTS) else part.text for part in message.content or ()
    ]
    return Message(
        "system" if message.role == "developer" else message.role,
        content[0] if len(content) == 1 and isinstance(content[0], str) else content or "",
        reasoning=message.reasoning_content,
        tool_calls=[_call(call) for call in message.tool_calls] if message.tool_calls else None,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _call(call: ToolCallIn) -> dict[str, Any]:
    """An earlier call; templates want its arguments as an object."""
    arguments: Any = call.function.arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict) and not is_deep(parsed):
        arguments = parsed
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
