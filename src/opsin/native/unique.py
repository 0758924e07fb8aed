"""Arrays whose items must differ, which llguidance cannot enforce: the answer is parsed as it is written.

An array counts as unique when any alternative of its schema says so. Where its items come from a short list of values,
the beginning of an item that can only repeat a used value is refused too, and so is a comma behind the last one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

_MOST_VALUES = 1000  # of a list of which one must be left
_SHORT: dict[str, list[Any]] = {"boolean": [False, True], "null": [None]}
_COMBINED = ("allOf", "anyOf", "oneOf")
_LEXEME = re.compile(rb'\s*(?:([{}\[\],:])|("[^"\\]*(?:\\.[^"\\]*)*"|[^\s{}\[\],:"]+(?=[\s{}\[\],:])))', re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Container:
    """An array or object that is open, with its schemas and the key or index of the current item."""

    start: int  # in the text
    nodes: list[Any]
    is_array: bool
    key: str | int | None
    seen: frozenset[Hashable] | None = None  # None: items may repeat
    values: dict[bytes, Hashable] = field(default_factory=dict)  # all that an item may be, when that is a short list

    def unused(self) -> list[bytes]:
        return [text for text, value in self.values.items() if value not in (self.seen or ())]

    def next_item(self) -> _Container | None:
        if self.values and not self.unused():
            return None
        return replace(self, key=self.key + 1 if isinstance(self.key, int) else None)

    def with_value(self, text: bytes) -> _Container | None:
        if self.key is None:
            return replace(self, key=json.loads(text.decode("utf-8", "replace")))
        if self.seen is None:
            return self
        item = _identity(text)
        return None if item in self.seen else replace(self, seen=self.seen | {item})


class UniqueItems:
    """The state of one answer."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._text = b""
        self._read = 0  # bytes that are parsed
        self._open: tuple[_Container, ...] = ()

    def fits(self, piece: bytes) -> bool:
        """Whether these bytes may follow."""
        return self._after(piece) is not None

    def take(self, piece: bytes) -> None:
        """Read on, over bytes that fit."""
        self._text, self._read, self._open = self._after(piece) or (self._text, self._read, self._open)

    def _after(self, piece: bytes) -> tuple[bytes, int, tuple[_Container, ...]] | None:
        """The state behind these bytes; None when an item repeats."""
        text, at, stack = self._text + piece, self._read, list(self._open)
        while (found := _LEXEME.match(text, at)) is not None:
            at, mark, start = found.end(), found[1], found.start(found.lastindex or 0)
            if mark in {b"{", b"["}:
                stack.append(self._opened(stack, start, is_array=mark == b"["))
                continue
            if mark in {b"}", b"]"}:
                start = stack.pop().start
            if stack and mark != b":":
                top = stack[-1].next_item() if mark == b"," else stack[-1].with_value(text[start:at])
                if top is None:
                    return None
                stack[-1] = top
        begun = text[at:].lstrip()
        if begun and stack and stack[-1].values and not any(one.startswith(begun) for one in stack[-1].unused()):
            return None
        return text, at, tuple(stack)

    def _opened(self, stack: list[_Container], start: int, *, is_array: bool) -> _Container:
        nodes = related(self._schema, self._inner(stack[-1]) if stack else [self._schema])
        made = _Container(start, nodes, is_array, 0 if is_array else None)
        if is_array and any(node.get("uniqueItems") is True for node in nodes):
            return replace(made, seen=frozenset(), values=self._values(self._inner(made)))
        return made

    def _inner(self, container: _Container) -> Iterator[Any]:
        """The schemas of a container's current item."""
        key = container.key
        for node in container.nodes:
            first, properties = node.get("prefixItems", []), node.get("properties", {})
            if isinstance(key, int):
                yield first[key] if key < len(first) else node.get("items")
            elif key in properties:
                yield properties[key]
            else:
                yield from (*node.get("patternProperties", {}).values(), node.get("additionalProperties"))

    def _values(self, nodes: Iterable[Any]) -> dict[bytes, Hashable]:
        """Everything an item may be, as text; empty when that is no short list of plain values."""
        values: list[Any] = []
        for node in related(self._schema, nodes):
            kind = str(node.get("type"))
            if kind == "integer" and {"minimum", "maximum"} <= node.keys():
                values += range(math.ceil(node["minimum"]), math.floor(node["maximum"]) + 1)[: _MOST_VALUES + 1]
            elif "const" in node or "enum" in node or kind in _SHORT:
                values += [node["const"]] if "const" in node else node.get("enum", _SHORT.get(kind, []))
            elif not node.keys() & {"$ref", *_COMBINED}:
                return {}
        texts = [json.dumps(value, ensure_ascii=False).encode() for value in values[: _MOST_VALUES + 1]]
        plain = len(texts) <= _MOST_VALUES and not any(re.search(rb"[\\{\[]", text) for text in texts)
        return {text: _identity(text) for text in texts} if plain else {}


def related(root: Any, nodes: Iterable[Any], keywords: Iterable[str] = _COMBINED) -> list[dict[str, Any]]:
    """Schemas, and those that they refer to or consist of by these keywords; each once."""
    found: dict[int, dict[str, Any]] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict) and id(node) not in found:
            found[id(node)] = node
            waiting += [resolved(root, node), *(one for keyword in keywords for one in node.get(keyword, []))]
    return list(found.values())


def resolved(root: Any, node: dict[str, Any]) -> Any:
    """The schema that a reference within the same document names; None when there is none."""
    reference = node.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    for key in reference[1:].split("/")[1:]:
        root = root.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root


def _identity(text: bytes) -> Hashable:
    """Equal for values that JSON Schema takes for equal: 1 and 1.0, and objects in any order."""
    try:
        return _hashable(json.loads(text.decode("utf-8", "replace"), parse_int=float))
    except (ValueError, RecursionError):
        return text


def _hashable(value: Any) -> Hashable:
    if isinstance(value, dict):
        return frozenset((key, _hashable(inner)) for key, inner in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else (type(value), value)
