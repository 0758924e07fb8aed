"""The messages of a request as those of the prompt room, with their pictures loaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

from opsin.core.errors import OpsinError
from opsin.core.picture import Picture
from opsin.core.server_settings import ServerSettings
from opsin.prompt import Content, Message
from opsin.server.context import Context
from opsin.server.errors import BadField
from opsin.server.params import is_deep
from opsin.server.schema import ImagePartIn, MessageIn, PartIn, ToolCallIn


async def read_messages(messages: Sequence[MessageIn], context: Context) -> list[Message]:
    """The conversation with its pictures, which are loaded side by side.

    Raises BadField for too many pictures or too much text, BadPrompt, and what loading a picture raises.
    """
    _check(messages, context.settings)
    places = [
        (f"messages[{i}].content[{j}].image_url", part)
        for i, message in enumerate(messages)
        for j, part in enumerate(message.content or ())
        if isinstance(part, ImagePartIn)
    ]
    loads = [asyncio.ensure_future(_load(part, place, context)) for place, part in places]
    try:
        pictures = iter(await asyncio.gather(*loads))
    finally:
        for load in loads:
            load.cancel()
    return [_message(message, pictures) for message in messages]


async def _load(part: ImagePartIn, place: str, context: Context) -> Picture:
    try:
        return await context.pictures.load(part.image_url.url, detail=part.image_url.detail)
    except OpsinError as error:
        # The client wants to know which of its pictures it was.
        error.param = place  # type: ignore[attr-defined]
        raise


def _check(messages: Sequence[MessageIn], settings: ServerSettings) -> None:
    parts = [part for message in messages for part in message.content or ()]
    n_pictures = sum(isinstance(part, ImagePartIn) for part in parts)
    if n_pictures > settings.max_pictures:
        raise BadField(
            f"The request has {n_pictures} pictures, and {settings.max_pictures} are the limit: send fewer.", "messages"
        )
    n_chars = sum(len(part.text) for part in parts if not isinstance(part, ImagePartIn))
    n_chars += sum(len(message.reasoning_content or "") for message in messages)
    n_chars += sum(len(call.function.arguments) for message in messages for call in message.tool_calls or ())
    check_text(n_chars, settings, "messages")


def check_text(n_chars: int, settings: ServerSettings, param: str) -> None:
    """Raises BadField when a request has more text than the settings allow."""
    if n_chars > settings.max_prompt_chars:
        raise BadField(
            f"The request's text has {n_chars:,} characters, and {settings.max_prompt_chars:,} are the limit: "
            "shorten it.",
            param,
        )


def _message(message: MessageIn, pictures: Any) -> Message:
    content: list[Content] = [_part(part, pictures) for part in message.content or ()]
    return Message(
        "system" if message.role == "developer" else message.role,
        content[0] if len(content) == 1 and isinstance(content[0], str) else content or "",
        reasoning=message.reasoning_content,
        tool_calls=[_call(call) for call in message.tool_calls] if message.tool_calls else None,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _part(part: PartIn, pictures: Any) -> Content:
    return cast("Picture", next(pictures)) if isinstance(part, ImagePartIn) else part.text


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
