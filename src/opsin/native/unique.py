"""Arrays whose items must differ, which llguidance cannot hold an answer to: watched while the answer is written.

The JSON is read byte by byte, with the schema beside it, so that it is known which array wants its items unique. An
array that may be one by any alternative counts as one. Where an item comes out of a list of values, a beginning that
leads to used values only is refused as well, and so is a comma behind the last of them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

Node = dict[str, Any]

_REFERENCES = 16  # followed one after another
_MOST_INTEGERS = 100


class UniqueItems:
    """How far one answer has come."""

    def __init__(self, schema: Node) -> None:
        self._schema = schema
        self._text = bytearray()
        self._containers: list[_Container] = []
        self._string = -1  # where the string that is open begins
        self._escaped = False

    def fits(self, piece: bytes) -> bool:
        """Whether these bytes may come next."""
        trial = copy.copy(self)
        trial._text = bytearray(self._text)  # noqa: SLF001 - a copy of this very object
        trial._containers = [one.copied() for one in self._containers]  # noqa: SLF001
        return trial.take(piece)

    def take(self, piece: bytes) -> bool:
        """Read on; False when an item repeats."""
        for byte in piece:
            self._text.append(byte)
            if not self._takes(chr(byte)):
                return False
        return not self._containers or self._string < 0 or self._may_go_on()

    def _takes(self, character: str) -> bool:
        if self._string >= 0:
            return self._takes_in_string(character)
        end = len(self._text)
        top = self._containers[-1] if self._containers else None
        fits = True
        match character:
            case '"':
                self._string = end - 1
            case "{" | "[":
                self._open(top, is_array=character == "[", start=end)
            case "}" | "]":
                fits = self._ended(end - 1)
                self._containers.pop()
                fits = fits and self._ended(end)
            case "," if top is not None:
                fits = self._ended(end - 1) and not (top.unique and top.values is not None and not top.unused())
                top.key = top.key + 1 if isinstance(top.key, int) else None
                top.start = end
            case " " | ":":
                pass
            case _:
                fits = self._may_go_on()
        return fits

    def _takes_in_string(self, character: str) -> bool:
        closes = character == '"' and not self._escaped
        self._escaped = character == "\\" and not self._escaped
        if not closes:
            return True
        start, self._string = self._string, -1
        top = self._containers[-1] if self._containers else None
        if top is not None and not top.is_array and top.key is None:
            top.key = json.loads(self._text[start:])
            return True
        return self._ended(len(self._text))

    def _open(self, outer: _Container | None, *, is_array: bool, start: int) -> None:
        within = [self._schema] if outer is None else self._inner(outer)
        opened = _Container(self._all(within), is_array, start)
        if opened.unique:
            opened.values = self._values_of(self._inner(opened))
        self._containers.append(opened)

    def _ended(self, end: int) -> bool:
        """An item of the innermost array may have ended here: whether it differs from all before."""
        top = self._containers[-1] if self._containers else None
        if top is None or not top.unique or len(top.items) > top.index:
            return True
        text = bytes(self._text[top.start : end]).strip()
        if not text:
            return True
        item = _normal(json.loads(text))
        if item in top.items:
            return False
        top.items.append(item)
        return True

    def _may_go_on(self) -> bool:
        """Whether what is written of an item out of a list can become one that is not used."""
        top = self._containers[-1] if self._containers else None
        if top is None or not top.unique or top.values is None or len(top.items) > top.index:
            return True
        begun = bytes(self._text[top.start :]).lstrip()
        return any(value.startswith(begun) for value in top.unused())

    def _inner(self, container: _Container) -> list[Any]:
        found: list[Any] = []
        for node in container.nodes:
            if container.is_array:
                first = node.get("prefixItems", [])
                found.append(first[container.index] if container.index < len(first) else node.get("items"))
            elif container.key in node.get("properties", {}):
                found.append(node["properties"][container.key])
            else:
                found += [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
        return found

    def _all(self, nodes: Sequence[Any], depth: int = 0) -> list[Node]:
        """Schemas, and those that they refer to or are made of."""
        found: list[Node] = []
        for node in nodes:
            if isinstance(node, dict) and depth < _REFERENCES:
                found += [node, *self._all(list(self._parts(node)), depth + 1)]
        return found

    def _parts(self, node: Node) -> Iterator[Any]:
        yield from (inner for keyword in ("allOf", "anyOf", "oneOf") for inner in node.get(keyword, []))
        reference = node.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            target: Any = self._schema
            for key in reference[1:].split("/")[1:]:
                target = target.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
            yield target

    def _values_of(self, nodes: Sequence[Any]) -> list[bytes] | None:
        """All that an item may be, as it is written; None when that is no short list."""
        found: set[bytes] = set()
        for node in self._all(nodes):
            values = _listed(node)
            if values is None and not set(node) & {"$ref", "allOf", "anyOf", "oneOf"}:
                return None
            found |= {json.dumps(value, ensure_ascii=False).encode() for value in values or []}
        plain = all(re.match(rb"[^\\{\[]*$", value) for value in found)
        return sorted(found) if found and plain else None


class _Container:
    """An array or object that is open. `start` is where its current item begins."""

    def __init__(self, nodes: list[Node], is_array: bool, start: int) -> None:
        self.nodes = nodes
        self.is_array = is_array
        self.start = start
        self.unique = is_array and any(node.get("uniqueItems") is True for node in nodes)
        self.key: str | int | None = 0 if is_array else None
        self.items: list[str] = []
        self.values: list[bytes] | None = None

    @property
    def index(self) -> int:
        return self.key if isinstance(self.key, int) else 0

    def copied(self) -> _Container:
        made = copy.copy(self)
        made.items = list(self.items)
        return made

    def unused(self) -> list[bytes]:
        return [value for value in self.values or [] if _normal(json.loads(value)) not in self.items]


def _listed(node: Node) -> list[Any] | None:
    if "const" in node:
        return [node["const"]]
    if isinstance(node.get("enum"), list):
        return list(node["enum"])
    low, high = node.get("minimum"), node.get("maximum")
    if node.get("type") == "integer" and isinstance(low, int) and isinstance(high, int) and high - low < _MOST_INTEGERS:
        return list(range(low, high + 1))
    short: dict[str, list[Any]] = {"boolean": [False, True], "null": [None]}
    return short.get(str(node.get("type")))


def _normal(value: Any) -> str:
    """One text for values that JSON Schema takes for equal: 1 and 1.0, and objects in any order."""
    return json.dumps(_whole(value), sort_keys=True)


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    return [_whole(inner) for inner in value] if isinstance(value, list) else value
