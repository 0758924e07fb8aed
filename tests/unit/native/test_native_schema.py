"""Schemas: what the grammar would not keep is refused, not passed over."""

import json
from typing import Any

import pytest

from opsin.core.errors import BadGrammar
from opsin.native.schema import normalise


def made(schema: Any) -> Any:
    return json.loads(normalise(json.dumps(schema)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"]},
        {"type": "array", "items": {"enum": [1, "minimum", None]}, "minItems": 1},
        {"type": "object", "properties": {"minimum": {"type": "number"}, "not": {"type": "null"}}},
        {"const": {"minimum": 3}},
        {"type": "string", "pattern": "^[a-z]{2}-[0-9]+$", "title": "a code", "description": "x"},
        {"type": "number", "default": 0.5, "examples": [{"not": 1}]},
    ],
)
def test_what_is_kept_passes_unchanged(schema: Any) -> None:
    assert made(schema) == schema


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "number", "minimum": 0}, "minimum"),
        ({"type": "integer", "minimum": 0}, "minimum"),
        ({"type": "integer", "minimum": 0, "maximum": 10**6}, "m..imum"),
        ({"type": "object", "properties": {"a": {"type": "number", "multipleOf": 2}}}, "multipleOf"),
        ({"anyOf": [{"type": "string"}, {"not": {"type": "string"}}]}, "not"),
        ({"$defs": {"a": {"type": "object", "minProperties": 1}}, "type": "null"}, "minProperties"),
        ({"type": "array", "items": {"if": {}, "type": "string"}}, "if"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
    ],
)
def test_what_would_be_passed_over_is_refused(schema: Any, keyword: str) -> None:
    with pytest.raises(BadGrammar, match=f"{keyword} cannot be kept: take it out"):
        made(schema)


def test_a_short_range_of_integers_is_listed() -> None:
    assert made({"type": "integer", "minimum": 2, "maximum": 4, "title": "n"}) == {"title": "n", "enum": [2, 3, 4]}
    assert made({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}) == {"enum": [1, 2]}


def test_a_reference_at_the_top_is_taken_in() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}
    assert made({"$ref": "#/$defs/n", "$defs": {"n": node}}) == {**node, "$defs": {"n": node}}


@pytest.mark.parametrize("pattern", ['^a"b$', "^[^a]$", r"^\S+$", r"^a\\b$"])
def test_a_pattern_that_breaks_out_of_its_string_is_refused(pattern: str) -> None:
    with pytest.raises(BadGrammar, match="quotation mark or a backslash"):
        made({"type": "string", "pattern": pattern})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"type": "obj', "not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"$ref": "#/$defs/m", "$defs": {}}', "does not hold"),
        ('{"$ref": "#/$defs/m", "$defs": {"m": 3}}', "no schema"),
        ('{"$ref": "#/$defs/m", "$defs": {"m": {"$ref": "#/$defs/m"}}}', ""),
    ],
)
def test_no_schema_is_one_sentence(text: str, says: str) -> None:
    if says:
        with pytest.raises(BadGrammar, match=says):
            normalise(text)
    else:
        normalise(text)
