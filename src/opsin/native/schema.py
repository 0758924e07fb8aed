"""JSON schemas in the form that llguidance enforces, and arrays with unique items, which it cannot enforce.

Keywords that llguidance lacks are rewritten with those that it has, so that an answer that fits the new schema fits the
old one. Schemas that would take minutes to compile are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from opsin.core.errors import BadGrammar
from opsin.core.files import read_table

Node = dict[str, Any]

MAX_DEPTH = 64
_MAX_MULTIPLE = 10_000
_TABLE = read_table(__file__, "schema.toml")
_UNEVALUATED: dict[str, int] = _TABLE["unevaluated"]
_LIMITS: dict[str, int] = _TABLE["sizes"] | _UNEVALUATED
_KEYWORDS = {kind: frozenset(names) for kind, names in _TABLE["keywords"].items()}
_DATE, _TIME = _TABLE["formats"]["date"], _TABLE["formats"]["time"]
_FORMATS = {"date": f"^(?:{_DATE})$", "time": f"^{_TIME}$", "date-time": f"^(?:{_DATE})T{_TIME}$"}
_FORMATS |= {f"uuid{n}": _TABLE["formats"]["uuid"].replace("VERSION", str(n)) for n in range(1, 9)}
_STANDARD_FORMATS = frozenset(_TABLE["formats"]["standard"])
_MOST_VALUES = 1000  # of a list of which one must be left
_SHORT: dict[str, list[Any]] = {"boolean": [False, True], "null": [None]}
_COMBINED = ("allOf", "anyOf", "oneOf")
_LEXEME = re.compile(rb'\s*(?:([{}\[\],:])|("[^"\\]*(?:\\.[^"\\]*)*"|[^\s{}\[\],:"]+(?=[\s{}\[\],:])))', re.DOTALL)


def prepare(text: str) -> tuple[Node, Node | None]:
    """The schema for llguidance, and the one with unique items, if it has any. Raises BadGrammar."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(f"it is not JSON ({error})") from error
    if schema is True:
        return {}, None
    if not isinstance(schema, dict):
        raise _refused("it must be a JSON object")
    sizes: Counter[str] = Counter()
    try:
        made = _rewritten(schema, schema, sizes, 0)
    except (AttributeError, TypeError) as error:
        raise _refused(f"something in it has the wrong type ({error})") from error
    made.pop("x-guidance", None)  # options for llguidance, which could loosen the schema
    _close(made, definitions='"allOf"' not in text)
    return made, schema if sizes["uniqueItems"] else None


def _close(node: Any, *, definitions: bool) -> None:
    """Objects that list their properties have no others, unless the schema says so: small models never stop adding.

    Every answer still fits the schema. Parts of an `allOf` stay open, as they see each other's properties; so do
    `definitions` where an `allOf` may refer to them.
    """
    if not isinstance(node, dict):
        return
    properties = node.get("properties", {})
    if properties.keys() >= set(node.get("required", ())) and properties and not node.keys() & _KEYWORDS["opening"]:
        node["additionalProperties"] = False
    inner = [*properties.values(), *node.get("prefixItems", ()), node.get("items")]
    if not properties:
        inner += [*node.get("anyOf", ()), *node.get("oneOf", ())]
    if definitions:
        inner += [*node.get("$defs", {}).values(), *node.get("definitions", {}).values()]
    for one in inner:
        _close(one, definitions=definitions)


def _refused(reason: str) -> BadGrammar:
    return BadGrammar(f"The JSON schema cannot be used: {reason}.")


def _rewritten(node: Any, root: Node, sizes: Counter[str], depth: int) -> Any:
    """A copy of a schema, or of a list of schemas, in llguidance's words; `sizes` counts what makes compiling slow."""
    if isinstance(node, list):
        return [inner if isinstance(inner, list) else _rewritten(inner, root, sizes, depth) for inner in node]
    if not isinstance(node, dict):
        return node
    if depth > MAX_DEPTH:
        raise _refused(f"it is nested more than {MAX_DEPTH} deep")
    made: Node = {}
    for keyword, value in node.items():
        if keyword in _LIMITS:
            most = _LIMITS[keyword]
            sizes[keyword] += 1 if keyword in _UNEVALUATED else len(value) if isinstance(value, (dict, list)) else 0
            if sizes[keyword] > most:
                raise _refused(f"its {keyword} have {sizes[keyword]} entries or more, and {most} are the limit")
        if keyword == "uniqueItems":
            sizes[keyword] += value is True
        elif keyword in _KEYWORDS["maps"] and isinstance(value, dict):
            made[keyword] = {name: _rewritten(inner, root, sizes, depth + 1) for name, inner in value.items()}
        else:
            made[keyword] = _rewritten(value, root, sizes, depth + 1) if keyword in _KEYWORDS["schemas"] else value
    sizes["multiple"] = math.lcm(sizes["multiple"] or 1, _coefficient(node.get("multipleOf")))
    if sizes["multiple"] > _MAX_MULTIPLE:
        raise _refused("the numbers of its multipleOf are too large")
    _rewrite_unevaluated(made, root)
    _rewrite_property_names(made, root)
    _rewrite_dependents(made)
    _rewrite_patterns(made)
    return made


def _rewrite_patterns(node: Node) -> None:
    if isinstance(name := node.get("format"), str) and name not in _STANDARD_FORMATS:
        del node["format"]
        if name in _FORMATS:
            node["allOf"] = [*node.get("allOf", []), {"pattern": _FORMATS[name]}]
    if "anyOf" in node:  # pydantic's Decimal is a number, or text with a lookahead, which llguidance lacks
        plain = [one for one in node["anyOf"] if not re.search(r"\(\?<?[=!]", json.dumps(one))]
        node["anyOf"] = plain or node["anyOf"]


def _rewrite_dependents(node: Node) -> None:
    """A property that needs others is absent, or they are there."""
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        if isinstance(node.get(keyword), dict):
            for name, needed in node.pop(keyword).items():
                names, schemas = (needed, []) if isinstance(needed, list) else ([], [needed])
                there = {"required": [name, *names], "allOf": schemas}
                node["allOf"] = [*node.get("allOf", []), {"anyOf": [{"properties": {name: False}}, there]}]


def _rewrite_property_names(node: Node, root: Node) -> None:
    """Names out of a list become optional properties; names with a pattern get their values by that pattern."""
    names = node.get("propertyNames")
    names = resolved(root, names) if isinstance(names, dict) and "$ref" in names else names
    if not isinstance(names, dict) or "patternProperties" in node:
        return
    properties, rest = node.get("properties", {}), node.get("additionalProperties", True)
    restricting = names.keys() - _KEYWORDS["annotations"] - {"type"}
    if restricting in ({"enum"}, {"const"}):
        allowed = [name for name in names.get("enum", [names.get("const")]) if isinstance(name, str)]
        node["properties"] = {name: properties.get(name, rest) for name in allowed}
    elif restricting == {"pattern"} and not properties:
        node["patternProperties"] = {names["pattern"]: rest}
    else:
        return
    node["additionalProperties"] = False
    del node["propertyNames"]


def _rewrite_unevaluated(node: Node, root: Node) -> None:
    """What nothing evaluated are the additional properties and items, unless evaluating has conditions."""
    if not node.keys() & _UNEVALUATED.keys():
        return
    parts = related(root, [node], ["allOf"])
    if any(part.keys() & {"anyOf", "oneOf", "if", "not"} for part in parts):
        return
    if "unevaluatedItems" in node and not node.keys() & {"$ref", "allOf", "items", "contains"}:
        node["items"] = node.pop("unevaluatedItems")
    closed = any(part.keys() & {"additionalProperties", "patternProperties"} for part in parts)
    if "unevaluatedProperties" in node and not closed:
        names = {name: True for part in parts for name in part.get("properties", {})}
        node["properties"] = names | node.get("properties", {})
        node["additionalProperties"] = node.pop("unevaluatedProperties")


def _coefficient(value: Any) -> int:
    """The digits of a number without zeros at their end: how many states it takes to divide by it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
        return 1
    return int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits)))


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
    """Watches an answer, as it is written, for items that repeat in an array whose items must differ.

    An array counts as unique when any alternative of its schema says so. Where its items come from a short list of
    values, the beginning of an item that can only repeat a used value is refused too, and a comma behind the last one.
    """

    def __init__(self, schema: Node) -> None:
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


def related(root: Any, nodes: Iterable[Any], keywords: Iterable[str] = _COMBINED) -> list[Node]:
    """Schemas, and those that they refer to or consist of by these keywords; each once."""
    found: dict[int, Node] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict) and id(node) not in found:
            found[id(node)] = node
            waiting += [resolved(root, node), *(one for keyword in keywords for one in node.get(keyword, []))]
    return list(found.values())


def resolved(root: Any, node: Node) -> Any:
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
