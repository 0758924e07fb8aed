"""Functions that the model may call: how it is told of them, and how its calls are found in what it writes."""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsin.core.files import read_table
from opsin.core.settings import ServerSettings
from opsin.prompt import Message, PromptBuilder
from opsin.server.errors import BadField
from opsin.server.schema import AnyTool, ChosenTool, FunctionIn, ToolIn, at_most, loads

_TABLE = read_table(__file__, "tools.toml")
_OPENERS: list[str] = _TABLE["openers"]
_PATTERNS = {name: re.compile(pattern, re.DOTALL) for name, pattern in _TABLE["patterns"].items()}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How a request's tools reach the model.

    `told` goes to the chat template; `instructions` go into the system message if the template has no place for tools;
    the whole answer keeps to `schema`. `names` are the functions that may be called.
    """

    names: frozenset[str]
    told: list[dict[str, Any]] | None = None
    instructions: str | None = None
    schema: str | None = None

    def messages(self, messages: list[Message]) -> list[Message]:
        """The conversation, with the instructions about tools in its system message."""
        if self.instructions is None:
            return messages
        if messages[0].role == "system":
            return [Message("system", [*messages[0].parts, self.instructions]), *messages[1:]]
        return [Message("system", self.instructions), *messages]


def plan_tools(
    tools: Sequence[AnyTool], choice: str | ChosenTool | None, prompts: PromptBuilder, settings: ServerSettings
) -> ToolPlan | None:
    """How a request's tools are handled; None where none may be called. Raises BadField.

    Tools of kinds that cannot be called here are left out, unless a call is asked for and there are no others.
    """
    given = (tool.function if isinstance(tool, ToolIn) else tool for tool in tools)
    functions = [function for function in given if isinstance(function, FunctionIn)]
    offered = choice in (None, "auto")
    if choice == "none" or (offered and not functions):
        return None
    by_name = {function.name: function for function in functions}
    if not by_name:
        raise BadField("tool_choice asks for a call, but there are no functions among tools: give some.", "tool_choice")
    shown = {
        name: function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        for name, function in by_name.items()
    }
    told = [{"type": "function", "function": function} for function in shown.values()]
    at_most(settings.max_schema_bytes, len(json.dumps(told)), "bytes", "tools")
    if isinstance(choice, ChosenTool):
        if choice.called not in by_name:
            raise BadField(f"tool_choice names {choice.called[:64]!r}, which is not among tools.", "tool_choice")
        by_name = {choice.called: by_name[choice.called]}
    schema = None if offered else _call_schema(list(by_name.values()))
    names = frozenset(by_name)
    if prompts.knows_tools:
        return ToolPlan(told=told, schema=schema, names=names)
    lines = (json.dumps(shown[name], ensure_ascii=False) for name in by_name)
    instructions = "\n".join((_TABLE["offered" if offered else "forced"], *lines))
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

    With a forced call the answer is one JSON object. Otherwise calls are looked for in the forms that models are
    trained on: JSON inside <tool_call> tags, a list after [TOOL_CALLS], and an answer that is a JSON object with the
    name of a known function. A call whose name comes first is told as it is written; of others everything is held back
    until the end. What turns out not to be a call is text.
    """

    def __init__(self, tools: ToolPlan) -> None:
        self._names, self._holds = tools.names, tools.schema is not None
        self._held = ""
        self._said = False
        self._arguments: _ObjectEnd | None = None
        self._told: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        """The calls that were found, as chat completions write them; the last one may have no end."""

    @property
    def cut(self) -> bool:
        """Whether the last call has no end."""
        return self._arguments is not None

    def take_told(self) -> list[dict[str, Any]]:
        """What is new of the calls: for each piece the call's `index`, at first also `id` and name, and `arguments`."""
        told, self._told = self._told, []
        return told

    def feed(self, text: str) -> str:
        """Take text; return what is certainly not part of a call."""
        self._held += text
        while self._arguments is not None or self._opens():
            if not self._read_arguments():
                return ""
        if self._holds or (not self._said and self._held.lstrip()[:1] in {"", "{"}):
            return ""
        start = min((at for tag in _OPENERS if (at := self._held.find(tag)) >= 0), default=-1)
        self._holds = start >= 0
        if not self._holds:
            start = len(self._held) - _may_open(self._held)
        text, self._held = self._held[:start], self._held[start:]
        self._said = self._said or bool(text.strip())
        return text + (self.feed("") if self._holds else "")

    def finish(self) -> str:
        """The answer is over: return what was held back and is not a call."""
        held, self._held = self._held, ""
        if self._arguments is not None:
            return ""
        if self.calls:
            held = held[end.end() :] if (end := _PATTERNS["tail"].match(held)) else held
            held = "" if _TABLE["closer"].startswith(held.strip()) else held
        if not self._said and self._read(held):
            return ""
        text = _PATTERNS["call"].sub(lambda found: "" if self._read(found[1] or found[2] or "") else found[0], held)
        return text if text.strip() or not self.calls else ""

    def _opens(self) -> bool:
        """Whether what is held begins with a call up to its arguments; then it is told."""
        if not (self._holds or self.calls or not self._said):
            return False
        head = _PATTERNS["head"].match(self._held)
        if head is None or (name := loads(head[1])) not in self._names:
            return False
        self._add(name, "")
        self._held, self._arguments = self._held[head.end() :], _ObjectEnd()
        return True

    def _read_arguments(self) -> bool:
        """Tell what is there of the open call's arguments; False if their end, or the call's, is not there yet."""
        assert self._arguments is not None
        end = self._arguments.find(self._held)
        piece, self._held = self._held[:end], self._held[end:]
        if piece:
            self.calls[-1]["function"]["arguments"] += piece
            self._told.append({"index": len(self.calls) - 1, "function": {"arguments": piece}})
        if not self._arguments.over:
            return False
        self._arguments, self._holds = None, True
        return True

    def _add(self, name: str, arguments: str) -> None:
        function = {"name": name, "arguments": arguments}
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        self._told.append({"index": len(self.calls), **call, "function": {**function}})
        self.calls.append(call)

    def _read(self, text: str) -> bool:
        """Read calls from JSON text; False if it holds none, or anything else."""
        value = loads(text)
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, dict) and str(item.get("name")) in self._names for item in items):
            return False
        for item in items:
            arguments = item.get("arguments", item.get("parameters", {}))
            self._add(
                item["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            )
        return True


class _ObjectEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._inside = self._escaped = False
        self.over = False

    def find(self, piece: str) -> int:
        """How much of the next piece belongs to it."""
        for at, sign in enumerate(piece):
            if self._inside:
                self._inside = self._escaped or sign != '"'
                self._escaped = sign == "\\" and not self._escaped
            elif sign == '"':
                self._inside = True
            else:
                self._depth += (sign in "{[") - (sign in "}]")
                if self._depth <= 0:
                    self.over = True
                    return at + 1
        return len(piece)


def _may_open(text: str) -> int:
    """How many characters at the end may be the start of a tag."""
    lengths = range(min(max(map(len, _OPENERS)) - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(tag.startswith(text[-n:]) for tag in _OPENERS)), 0)
