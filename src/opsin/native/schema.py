"""JSON schemas in the form that llguidance enforces.

llguidance refuses what it cannot enforce. Here keywords that it lacks are rewritten with those that it has, so that an
answer that fits the new schema fits the old one, and schemas that would take minutes to compile are refused first.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from decimal import Decimal
from typing import Any

from opsin.core.errors import BadGrammar
from opsin.native.unique import related, resolved

Node = dict[str, Any]

MAX_DEPTH = 64
# Compiling takes time that grows with the square of these (pairs of patterns are compared with each other), or worse.
_LIMITS = {"properties": 1000, "$defs": 1000, "definitions": 1000, "required": 1000, "patternProperties": 32}
_LIMITS |= {"unevaluatedProperties": 100, "unevaluatedItems": 100}  # each follows all references below it
_UNEVALUATED = frozenset(("unevaluatedProperties", "unevaluatedItems"))
_MAX_MULTIPLE = 10_000
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"))
_SCHEMAS = frozenset((
    "allOf", "anyOf", "oneOf", "prefixItems", "additionalProperties", "unevaluatedProperties", "items",
    "unevaluatedItems", "contains", "not", "if", "then", "else", "propertyNames",
))  # fmt: skip
_OPENING = frozenset((
    "additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties", "allOf",
    "anyOf", "oneOf", "$ref", "if", "not",
))  # fmt: skip
_ANNOTATIONS = frozenset(("title", "description", "$comment", "examples", "default", "deprecated"))

_DATE = (
    r"[1-9]\d{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    r"|02-(?:0[1-9]|1\d|2[0-8]))|[1-9]\d(?:0[48]|[2468][048]|[13579][26])-02-29|(?:[2468][048]|1[26]|[3579][26])00-02-29"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
# llguidance's own have no upper bound, or permit days and seconds that no calendar has.
_FORMATS = {"date": f"^(?:{_DATE})$", "time": f"^{_TIME}$", "date-time": f"^(?:{_DATE})T{_TIME}$"} | {
    f"uuid{n}": f"^[0-9a-f]{{8}}-[0-9a-f]{{4}}-{n}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}$"
    for n in range(1, 9)
}
# llguidance enforces or refuses these. Any other name is somebody's own and restricts nothing.
_STANDARD_FORMATS = frozenset((
    "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "idn-email", "idn-hostname", "uri-reference", "iri",
    "iri-reference", "uri-template", "json-pointer", "relative-json-pointer", "regex",
))  # fmt: skip


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
    if properties.keys() >= set(node.get("required", ())) and properties and not node.keys() & _OPENING:
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
            sizes[keyword] += 1 if keyword in _UNEVALUATED else len(value) if isinstance(value, (dict, list)) else 0
            if sizes[keyword] > _LIMITS[keyword]:
                raise _refused(
                    f"its {keyword} have {sizes[keyword]} entries or more, and {_LIMITS[keyword]} are the limit"
                )
        if keyword == "uniqueItems":
            sizes[keyword] += value is True
        elif keyword in _MAPS and isinstance(value, dict):
            made[keyword] = {name: _rewritten(inner, root, sizes, depth + 1) for name, inner in value.items()}
        else:
            made[keyword] = _rewritten(value, root, sizes, depth + 1) if keyword in _SCHEMAS else value
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
    restricting = names.keys() - _ANNOTATIONS - {"type"}
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
    if not node.keys() & _UNEVALUATED:
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
