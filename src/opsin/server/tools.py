"""Tools: what the model is told of them, what its answer is held to, and calls read out of its text."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsin.core.server_settings import ServerSettings
from opsin.prompt import Message, PromptBuilder
from opsin.server.errors import BadField
from opsin.server.params import MOST_DEPTH, check_schema, is_deep
from opsin.server.schema import FunctionIn, NamedTool, ToolIn

_TAGGED = ("<tool_call>", "</tool_call>")
_LISTED = "[TOOL_CALLS]"
_PYTHON_TAG = "<|python_tag|>"
_OPENERS = (_TAGGED[0], _LISTED, _PYTHON_TAG)


@dataclass(frozen=True, slots=True)
class Call:
    """A function that the model wants called; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        """The call as chat completions write it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How a request's tools are brought to the model.

    `told` goes to the chat template, `words` into a system message where the template has no place for tools,
    `schema` is what the whole answer must keep to. `names` are the functions that may be called; none: no call is
    looked for.
    """

    told: list[dict[str, Any]] | None = None
    words: str | None = None
    schema: str | None = None
    names: frozenset[str] = frozenset()

    def messages(self, messages: list[Message]) -> list[Message]:
        """The conversation with the words about tools in its system message."""
        if self.words is None:
            return messages
        if messages[0].role == "system":
            return [Message("system", [*messages[0].parts, self.words]), *messages[1:]]
        return [Message("system", self.words), *messages]

    def reader(self) -> CallReader | None:
        """What reads one answer; None when no call is looked for."""
        return CallReader(self.names, whole=self.schema is not None) if self.names else None


def plan_tools(
    tools: Sequence[ToolIn] | None,
    choice: str | NamedTool | None,
    prompts: PromptBuilder,
    settings: ServerSettings,
) -> ToolPlan:
    """What is to be done about a request's tools. Raises BadField."""
    functions = {tool.function.name: tool.function for tool in tools or ()}
    if not functions:
        if choice not in (None, "none", "auto"):
            raise BadField("tool_choice asks for a call, but there are no tools: give some.", "tool_choice")
        return ToolPlan()
    if any(is_deep(function.parameters) for function in functions.values()):
        raise BadField(f"tools has parameters nested more than {MOST_DEPTH} deep: make them flatter.", "tools")
    told = [_as_told(function) for function in functions.values()]
    check_schema(json.dumps(told), settings, "tools")
    if choice == "none":
        return ToolPlan()
    if choice in (None, "auto"):
        if not prompts.knows_tools:
            raise BadField(
                "This model's chat template knows no tools, so that it cannot choose by itself whether to call one: "
                'set tool_choice to "required" or name a function, or leave tools out.',
                "tools",
            )
        return ToolPlan(told=told, names=frozenset(functions))
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in functions:
            raise BadField(f"tool_choice names the function {name[:64]!r}, which is not among tools.", "tool_choice")
        functions = {name: functions[name]}
    return ToolPlan(
        told=told if prompts.knows_tools else None,
        words=None if prompts.knows_tools else _words(functions.values()),
        schema=_schema(list(functions.values())),
        names=frozenset(functions),
    )


def _as_told(function: FunctionIn) -> dict[str, Any]:
    return {"type": "function", "function": function.model_dump(exclude_none=True, exclude={"strict"})}


def _words(functions: Any) -> str:
    lines = [json.dumps(_as_told(function)["function"], ensure_ascii=False) for function in functions]
    shape = '{"name": the function\'s name, "arguments": an object with its arguments}'
    return "\n".join(("Call one of these functions. Answer with JSON alone:", shape, *lines))


def _schema(functions: Sequence[FunctionIn]) -> str:
    """The JSON schema of a call of one of the functions."""
    calls, shared = [], {}
    for i, function in enumerate(functions):
        arguments = function.parameters or {"type": "object"}
        if '"$ref"' in json.dumps(arguments):
            # References count from the root, which moves when the schema becomes a part of another.
            shared[f"f{i}"] = _moved(arguments, f"#/$defs/f{i}")
            arguments = {"$ref": f"#/$defs/f{i}"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return json.dumps({**schema, "$defs": shared} if shared else schema)


def _moved(value: Any, root: str) -> Any:
    if isinstance(value, dict):
        return {
            key: root + item[1:] if key == "$ref" and isinstance(item, str) and item[:1] == "#" else _moved(item, root)
            for key, item in value.items()
        }
    return [_moved(item, root) for item in value] if isinstance(value, list) else value


class CallReader:
    """Takes an answer piece by piece and tells its text from its calls.

    With `whole` the answer is one JSON object and nothing else. Otherwise calls are looked for in the forms that
    models are trained on: JSON within <tool_call> tags, a list behind [TOOL_CALLS], and an answer that is a JSON
    object with the name of a known function. What is no call in the end is text.
    """

    def __init__(self, names: frozenset[str], *, whole: bool = False) -> None:
        self._names = names
        self._whole = whole
        self._held = ""
        self._said = False
        self.calls: list[Call] = []

    def feed(self, text: str) -> str:
        """Take text in; give what is certainly no part of a call."""
        self._held += text
        if self._whole or (not self._said and self._held.lstrip()[:1] in {"", "{"}):
            return ""
        given = ""
        while True:
            start = min((at for tag in _OPENERS if (at := self._held.find(tag)) >= 0), default=-1)
            if start < 0:
                return given + self._give(len(self._held) - _tail(self._held))
            given += self._give(start)
            end = self._held.find(_TAGGED[1])
            if not self._held.startswith(_TAGGED[0]) or end < 0:
                return given
            block, self._held = self._held[: end + len(_TAGGED[1])], self._held[end + len(_TAGGED[1]) :]
            if not self._read(block[len(_TAGGED[0]) : -len(_TAGGED[1])]):
                self._said, given = True, given + block

    def finish(self) -> str:
        """The answer is over: give what was held back and is no call."""
        held, self._held = self._held, ""
        for tag in _OPENERS:
            if held.startswith(tag) and self._read(held.removeprefix(tag)):
                return ""
        if not self._said and not self.calls and self._read(held):
            return ""
        return "" if self.calls and not held.strip() else held

    def _give(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        if self.calls and not text.strip():
            return ""  # space between two calls
        self._said = self._said or bool(text.strip())
        return text

    def _read(self, text: str) -> bool:
        """Take calls out of JSON text; False when it holds none."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        calls = [self._call(item) for item in (value if isinstance(value, list) else [value])]
        found = [call for call in calls if call is not None]
        if not found or len(found) < len(calls):
            return False
        self.calls += found
        return True

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or value["name"] not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return Call(f"call_{uuid.uuid4().hex[:24]}", value["name"], text)


def _tail(text: str) -> int:
    """How many characters at the end may be the beginning of a tag."""
    longest = max(len(tag) for tag in _OPENERS)
    return next(
        (n for n in range(min(longest - 1, len(text)), 0, -1) if any(tag.startswith(text[-n:]) for tag in _OPENERS)), 0
    )
