"""Tools: how they reach the model, and how its answer is read for calls. Only requests with tools come here."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsin.prompt import Message
from opsin.server.errors import BadField
from opsin.server.handler import ModelManager
from opsin.server.schema import FunctionIn, at_most

_OPENERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)|(?:\[TOOL_CALLS\]|<\|python_tag\|>)(.*)", re.DOTALL)


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

    def reader(self) -> CallReader:
        """A reader for one answer."""
        return CallReader(self.names, whole=self.schema is not None)


def plan_tools(functions: Sequence[FunctionIn], choice: str | FunctionIn | None, model: ModelManager) -> ToolPlan:
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
    at_most(model.settings.max_schema_bytes, len(json.dumps(told)), "bytes", "tools")
    knows_tools = model.prompts.knows_tools
    if choice in (None, "auto"):
        if not knows_tools:
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
    if knows_tools:
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


class CallReader:
    """Takes an answer piece by piece and separates its text from its calls.

    Without `names` all is text. With `whole` the answer is one JSON object and nothing else. Otherwise calls are looked
    for in the forms that models are trained on: JSON inside <tool_call> tags, a list after [TOOL_CALLS], and an answer
    that is a JSON object with the name of a known function. What turns out not to be a call is text. From the first
    sign of a call on, everything is held back until the end.
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
        if not self._names:
            return text
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
