"""JSON schemas in the form that llguidance keeps to.

llguidance refuses what it cannot hold an answer to, with one sentence. Here that is made less often: what a schema says
in words that llguidance lacks is said in those that it has, always so that an answer that fits the new schema fits the
old one. And a schema whose compiling would take minutes is refused first.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from fractions import Fraction
from typing import Any

from opsin.core.errors import BadGrammar

Node = dict[str, Any]

MAX_DEPTH = 64

# Compiling takes time that grows with the square of these (pairs of patterns are compared with each other), or worse.
_MOST = {"properties": 1000, "$defs": 1000, "definitions": 1000, "required": 1000, "patternProperties": 32}
_MOST_MULTIPLE = 10_000
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    "additionalProperties", "unevaluatedProperties", "items", "unevaluatedItems", "contains", "not", "if", "then",
    "else", "propertyNames",
)  # fmt: skip
_NOTES = frozenset(("title", "description", "$comment", "examples", "default", "deprecated"))
_REFERENCES = 8  # followed one after another
_LOOKS_AROUND = re.compile(r"\(\?<?[=!]")

_DATE = (
    r"[1-9]\d{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    r"|02-(?:0[1-9]|1\d|2[0-8]))|[1-9]\d(?:0[48]|[2468][048]|[13579][26])-02-29|(?:[2468][048]|1[26]|[3579][26])00-02-29"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
# llguidance's own have no upper bound, or hold days and seconds that no calendar has.
_FORMATS = {
    "date": f"^(?:{_DATE})$",
    "time": f"^{_TIME}$",
    "date-time": f"^(?:{_DATE})T{_TIME}$",
    **{
        f"uuid{version}": f"^[0-9a-f]{{8}}-[0-9a-f]{{4}}-{version}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}$"
        for version in range(1, 9)
    },
}
_KNOWN_FORMATS = frozenset(("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
# Other formats are notes of somebody's own and restrict nothing; these do, and llguidance refuses them.
_STANDARD_FORMATS = frozenset((
    "idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template", "json-pointer",
    "relative-json-pointer", "regex",
))  # fmt: skip


def prepare(text: str) -> tuple[Node, Node | None]:
    """The schema for llguidance, and the one to watch unique items by where there are any. Raises BadGrammar."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(f"it is not JSON ({error})") from error
    if schema is True:
        return {}, None
    if not isinstance(schema, dict):
        raise _refused("it must be a JSON object")
    rewriter = _Rewriter(schema)
    made = rewriter.rewritten(schema, 0)
    rewriter.check_sizes()
    made.pop("x-guidance", None)  # options of llguidance's, which could loosen the schema
    return made, schema if rewriter.unique else None


def _refused(reason: str) -> BadGrammar:
    return BadGrammar(f"The JSON schema cannot be used: {reason}.")


class _Rewriter:
    """Goes through a schema once, and counts what makes compiling slow."""

    def __init__(self, root: Node) -> None:
        self._root = root
        self._sizes: Counter[str] = Counter()
        self._multiple = 1
        self.unique = False

    def check_sizes(self) -> None:
        for keyword, most in _MOST.items():
            if self._sizes[keyword] > most:
                raise _refused(f"its {keyword} have {self._sizes[keyword]} entries, and {most} are the limit")
        if self._multiple > _MOST_MULTIPLE:
            raise _refused("the numbers of its multipleOf are too large")

    def rewritten(self, node: Any, depth: int) -> Any:
        """A copy of a schema, and of all within it, in llguidance's words."""
        if not isinstance(node, dict):
            return node
        if depth > MAX_DEPTH:
            raise _refused(f"it is nested more than {MAX_DEPTH} deep")
        self._count(node)
        made = dict(node)
        self.unique |= made.pop("uniqueItems", False) is True
        for keyword in _NAMED:
            if isinstance(made.get(keyword), dict):
                made[keyword] = {name: self.rewritten(inner, depth + 1) for name, inner in made[keyword].items()}
        for keyword in _LISTED:
            if isinstance(made.get(keyword), list):
                made[keyword] = [self.rewritten(inner, depth + 1) for inner in made[keyword]]
        for keyword in _SINGLE:
            if keyword in made:
                made[keyword] = self.rewritten(made[keyword], depth + 1)
        _rewrite_format(made)
        _rewrite_dependents(made)
        self._rewrite_property_names(made)
        self._rewrite_unevaluated(made)
        _drop_lookarounds(made)
        return made

    def _count(self, node: Node) -> None:
        for keyword in _MOST:
            if isinstance(node.get(keyword), (dict, list)):
                self._sizes[keyword] += len(node[keyword])
        self._multiple = math.lcm(self._multiple, _coefficient(node.get("multipleOf", 1)))

    def _resolved(self, node: Any) -> Any:
        """What a reference within the schema stands for, when that is simple to find."""
        for _ in range(_REFERENCES):
            reference = node.get("$ref") if isinstance(node, dict) else None
            if not isinstance(reference, str) or not reference.startswith("#/"):
                break
            node = self._root
            for key in reference[2:].split("/"):
                node = node.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
        return node

    def _rewrite_property_names(self, node: Node) -> None:
        """Names out of a list become optional properties; names by a pattern get their values by that pattern."""
        names = self._resolved(node.get("propertyNames"))
        properties = node.get("properties", {})
        if not isinstance(names, dict) or not isinstance(properties, dict) or "patternProperties" in node:
            return
        rest = node.get("additionalProperties", True)
        restricting = names.keys() - _NOTES - {"type"}
        listed = [names["const"]] if "const" in names else names.get("enum")
        if restricting <= {"enum", "const"} and isinstance(listed, list):
            allowed = [name for name in listed if isinstance(name, str)]
            node["properties"] = {
                name: properties.get(name, rest) for name in [*properties, *allowed] if name in allowed
            }
        elif restricting == {"pattern"} and not properties:
            node["patternProperties"] = {names["pattern"]: rest}
        else:
            return
        node["additionalProperties"] = False
        del node["propertyNames"]

    def _rewrite_unevaluated(self, node: Node) -> None:
        """What nobody looked at are the additional properties and items, where nobody looks at others conditionally."""
        if node.keys() & {"anyOf", "oneOf", "if", "not"}:
            return
        if "unevaluatedItems" in node and not node.keys() & {"$ref", "allOf", "items", "contains"}:
            node["items"] = node.pop("unevaluatedItems")
        if "unevaluatedProperties" in node and not node.keys() & {"additionalProperties", "patternProperties"}:
            seen = self._properties(node, 0)
            if seen is not None:
                node["properties"] = dict.fromkeys(seen, True) | node.get("properties", {})
                node["additionalProperties"] = node.pop("unevaluatedProperties")

    def _properties(self, node: Any, depth: int) -> dict[str, None] | None:
        """Names that a schema looks at, whatever the answer holds; None when that cannot be said."""
        if not isinstance(node, dict) or depth > _REFERENCES:
            return None
        found = dict.fromkeys(node.get("properties", {}))
        for inner in [*node.get("allOf", []), *([self._resolved(node)] if "$ref" in node else [])]:
            names = self._properties(inner, depth + 1)
            if names is None or inner.keys() & {"additionalProperties", "patternProperties"}:
                return None
            found |= names
        return found


def _and(node: Node, more: Node) -> None:
    """Make a schema keep to another one as well."""
    node["allOf"] = [*node.get("allOf", []), more]


def _rewrite_format(node: Node) -> None:
    name = node.get("format")
    if not isinstance(name, str) or name in _KNOWN_FORMATS or name in _STANDARD_FORMATS:
        return
    del node["format"]
    pattern = _FORMATS.get(name)
    if pattern is not None and "pattern" in node:
        _and(node, {"pattern": pattern})
    elif pattern is not None:
        node["pattern"] = pattern


def _rewrite_dependents(node: Node) -> None:
    """A property that needs others is absent, or they are there."""
    needs = {**_popped(node, "dependentRequired"), **_popped(node, "dependentSchemas"), **_popped(node, "dependencies")}
    for name, needed in needs.items():
        there = {"required": [name, *needed]} if isinstance(needed, list) else {"required": [name], "allOf": [needed]}
        _and(node, {"anyOf": [{"properties": {name: False}}, there]})


def _popped(node: Node, keyword: str) -> Node:
    return dict(node.pop(keyword)) if isinstance(node.get(keyword), dict) else {}


def _drop_lookarounds(node: Node) -> None:
    """Of alternatives those that llguidance can write: pydantic's Decimal is a number, or text with a lookahead."""
    alternatives = node.get("anyOf")
    if isinstance(alternatives, list):
        plain = [one for one in alternatives if not (isinstance(one, dict) and _looks_around(one))]
        node["anyOf"] = plain or alternatives


def _looks_around(node: Node) -> bool:
    return isinstance(node.get("pattern"), str) and _LOOKS_AROUND.search(node["pattern"]) is not None


def _coefficient(value: Any) -> int:
    """The digits of a number without zeros at their end: how many states it takes to divide by it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return 1
    digits = Fraction(str(value))
    while digits.denominator > 1:
        digits *= 10
    number = max(1, abs(digits.numerator))
    while number % 10 == 0:
        number //= 10
    return number
