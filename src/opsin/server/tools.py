"""Tools and response formats: what the model is told, the schema its answer keeps to, and calls found in its text."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsin.core.server_settings import ServerSettings
from opsin.prompt import Message, PromptBuilder
from opsin.server.errors import BadField, at_most
from opsin.server.schema import FlatSchemaFormat, FunctionIn, NamedFunction, ObjectFormat, SchemaFormat, TextFormat

MAX_DEPTH = 64

_TAGGED = ("<tool_call>", "</tool_call>")
_LISTED = "[TOOL_CALLS]"
_PYTHON_TAG = "<|python_tag|>"
_OPENERS = (_TAGGED[0], _LISTED, _PYTHON_TAG)


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
    told = [_as_told(function) for function in by_name.values()]
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
            raise BadField(
                f"tool_choice names the function {choice.name[:64]!r}, which is not among tools.", "tool_choice"
            )
        by_name = {choice.name: by_name[choice.name]}
    return ToolPlan(
        told=told if prompts.knows_tools else None,
        instructions=None if prompts.knows_tools else _instructions(by_name.values()),
        schema=_call_schema(list(by_name.values())),
        names=frozenset(by_name),
    )


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


def _as_told(function: FunctionIn) -> dict[str, Any]:
    return {"type": "function", "function": function.model_dump(exclude_none=True, exclude={"strict", "type"})}


def _instructions(functions: Iterable[FunctionIn]) -> str:
    lines = [json.dumps(_as_told(function)["function"], ensure_ascii=False) for function in functions]
    shape = '{"name": the function\'s name, "arguments": an object with its arguments}'
    return "\n".join(("Call one of these functions. Answer with JSON alone:", shape, *lines))


def _call_schema(functions: Sequence[FunctionIn]) -> str:
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
    """Takes an answer piece by piece and separates its text from its calls.

    With `whole` the answer is one JSON object and nothing else. Otherwise calls are looked for in the forms that
    models are trained on: JSON inside <tool_call> tags, a list after [TOOL_CALLS], and an answer that is a JSON object
    with the name of a known function. What turns out not to be a call is text.
    """

    def __init__(self, names: frozenset[str], *, whole: bool = False) -> None:
        self._names = names
        self._whole = whole
        self._held = ""
        self._said = False
        self.calls: list[dict[str, Any]] = []
        """The calls that were found, as chat completions write them."""

    def feed(self, text: str) -> str:
        """Take text; return what is certainly not part of a call."""
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
        """The answer is over: return what was held back and is not a call."""
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
        """Read calls from JSON text; False if it holds none."""
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

    def _call(self, value: Any) -> dict[str, Any] | None:
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or value["name"] not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": value["name"], "arguments": text}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _tail(text: str) -> int:
    """How many characters at the end may be the start of a tag."""
    longest = max(len(tag) for tag in _OPENERS)
    return next(
        (n for n in range(min(longest - 1, len(text)), 0, -1) if any(tag.startswith(text[-n:]) for tag in _OPENERS)), 0
    )
