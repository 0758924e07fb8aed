"""JSON schemas brought into the form that the grammar converter keeps to, or refused.

The converter passes over keywords that it does not know, and over definitions behind a reference at the top. An
answer that breaks a rule of its schema without a word is worse than a refusal, so both are looked for here.
"""

from __future__ import annotations

import json
import re
from typing import Any

from opsin.core.errors import BadGrammar

# Keywords that restrict and that no grammar made by the converter would keep.
_NOT_KEPT = re.compile(
    "minimum|maximum|exclusiveMinimum|exclusiveMaximum|multipleOf|minProperties|maxProperties|patternProperties|"
    "propertyNames|contains|minContains|maxContains|not|if|then|else|dependentRequired|dependentSchemas|"
    "dependencies|unevaluatedItems|unevaluatedProperties"
)
_NAMED = ("properties", "$defs", "definitions")
_NESTED = ("items", "prefixItems", "additionalProperties", "oneOf", "anyOf", "allOf")
_MOST_INTEGERS = 1000
_ROOT_REFERENCES = 8
# What could match a quotation mark or a backslash would end the JSON string that the pattern stands in.
_BREAKS_OUT = re.compile(r'"|\[\^|\\[SWDsw"\\]')


def normalise(text: str) -> str:
    """The schema as JSON text, ready for the converter. Raises BadGrammar."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(f"it is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise _refused("it must be a JSON object")
    return json.dumps(_kept(_rooted(schema)))


def _refused(reason: str) -> BadGrammar:
    return BadGrammar(f"The JSON schema cannot be used: {reason}.")


def _rooted(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with a reference at its top taken in: recursive models are written just so."""
    for _ in range(_ROOT_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/") or len(schema) == 1:
            break
        target: Any = schema
        for key in reference[2:].split("/"):
            if not isinstance(target, dict) or key not in target:
                raise _refused(f"it refers to {reference}, which it does not hold")
            target = target[key]
        if not isinstance(target, dict):
            raise _refused(f"it refers to {reference}, which is no schema")
        schema = {**{name: value for name, value in schema.items() if name != "$ref"}, **target}
    return schema


def _kept(node: Any) -> Any:
    """A copy of a schema in which every keyword is one that is kept."""
    if isinstance(node, list):
        return [_kept(one) for one in node]
    if not isinstance(node, dict):
        return node
    node = _listed_integers(node)
    for keyword in filter(_NOT_KEPT.fullmatch, node):
        raise _refused(f"{keyword} cannot be kept: take it out, or check the answer yourself")
    if node.get("uniqueItems"):
        raise _refused("uniqueItems cannot be kept: take it out, or check the answer yourself")
    pattern = node.get("pattern")
    if isinstance(pattern, str) and _BREAKS_OUT.search(pattern):
        raise _refused("a pattern in it could match a quotation mark or a backslash: name the characters it allows")
    made = dict(node)
    for keyword in _NAMED:
        if isinstance(made.get(keyword), dict):
            made[keyword] = {name: _kept(value) for name, value in made[keyword].items()}
    for keyword in _NESTED:
        if keyword in made:
            made[keyword] = _kept(made[keyword])
    return made


def _listed_integers(node: dict[str, Any]) -> dict[str, Any]:
    """A short range of integers as the list of its members: the one form of bounds that the converter keeps."""
    if node.get("type") != "integer" or "enum" in node or "const" in node:
        return node
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    low = above + 1 if isinstance(above, int) else node.get("minimum")
    high = below - 1 if isinstance(below, int) else node.get("maximum")
    if not isinstance(low, int) or not isinstance(high, int) or not 0 <= high - low < _MOST_INTEGERS:
        return node
    bounds = {"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    return {**{name: value for name, value in node.items() if name not in bounds}, "enum": [*range(low, high + 1)]}
