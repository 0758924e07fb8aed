"""Messages in OpenAI's shape to those of the prompt room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opsin.compat.handlers import MTMDChatHandler
from opsin.core.errors import BadParameter, BadPrompt
from opsin.core.picture import Picture
from opsin.prompt import Content, Message


def read_messages(
    messages: Sequence[Mapping[str, Any]],
    handler: MTMDChatHandler | None,
    load: Callable[[str], Picture],
) -> list[Message]:
    """The conversation, pictures loaded, in the order that the handler's family wants.

    Raises BadPrompt for another shape, and what `load` raises.
    """
    return [_message(message, handler, load) for message in messages]


def _message(message: Mapping[str, Any], handler: MTMDChatHandler | None, load: Callable[[str], Picture]) -> Message:
    if not isinstance(message, Mapping):
        raise BadPrompt(f"A message is a {type(message).__name__}: give a dict with role and content.")
    content = message.get("content")
    if content is None or isinstance(content, str):
        parts: list[Content] = [content] if content else []
    else:
        parts = [_part(part, load) for part in content]
    role: Any = message.get("role")
    if handler is not None and role == "user":
        parts = _arranged(parts, handler)
    extras = {name: message[name] for name in ("tool_calls", "tool_call_id", "name") if message.get(name) is not None}
    return Message(role, parts or "", **extras)


def _part(part: Any, load: Callable[[str], Picture]) -> Content:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return str(part.get("text", ""))
    if kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, Mapping) else image
        if isinstance(url, str):
            return load(url)
        raise BadPrompt("An image_url part has no address: give {'image_url': {'url': …}}.")
    raise BadPrompt(f"A part of a message has the type {kind!r}: use text or image_url.")


def _arranged(parts: list[Content], handler: MTMDChatHandler) -> list[Content]:
    """Pictures, then what the family writes between, then all text in one."""
    if not handler.pictures_first:
        return parts
    pictures: list[Content] = [part for part in parts if isinstance(part, Picture)]
    text = "".join(part for part in parts if isinstance(part, str))
    between = handler.between if pictures else handler.between.lstrip()
    return [*pictures, f"{between}{text}"]


def forced_tool(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The function that `tool_choice` names, None when it names none. Raises BadParameter."""
    if not isinstance(choice, Mapping):
        if choice == "required":
            raise BadParameter('tool_choice="required" is not supported: name the function that is to be called.')
        return None
    name = choice.get("function", {}).get("name")
    for tool in tools or ():
        function: Mapping[str, Any] = tool.get("function", {})
        if function.get("name") == name:
            return function
    raise BadParameter(f"tool_choice names the function {name!r}, which is not among the tools.")


def as_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
    functions: Sequence[Mapping[str, Any]] | None,
    call: str | Mapping[str, Any] | None,
) -> tuple[list[dict[str, Any]] | None, str | Mapping[str, Any] | None]:
    """Tools and choice, with OpenAI's older `functions` and `function_call` brought into the newer form."""
    if functions is not None:
        tools = [{"type": "function", "function": dict(function)} for function in functions]
    if call is not None:
        choice = call if isinstance(call, str) else {"type": "function", "function": {"name": call.get("name")}}
    return None if tools is None else [dict(tool) for tool in tools], choice


def arguments_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The response format that is a function's arguments."""
    return {"type": "json_object", "schema": function.get("parameters") or {"type": "object"}}
