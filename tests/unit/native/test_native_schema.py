"""Schemas in llguidance's words: never looser than they were, and none that takes long to compile."""

import json
import re
from typing import Any

import pytest

from opsin.core.errors import BadGrammar
from opsin.native.schema import UniqueItems, prepare


def made(schema: Any) -> Any:
    return prepare(json.dumps(schema))[0]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"]},
        {"type": "array", "items": {"enum": [1, "format", None]}, "minItems": 1},
        {"type": "object", "properties": {"format": {"type": "number"}, "not": {"type": "null"}}},
        {"const": {"format": "date", "uniqueItems": True}},
        {"type": "string", "format": "uuid"},
        {"type": "string", "format": "regex"},
        {"not": {"type": "string"}},
    ],
)
def test_what_needs_no_change_passes_unchanged(schema: Any) -> None:
    open_to_all = json.loads(json.dumps(schema), object_hook=_opened)
    assert made(open_to_all) == open_to_all


def _opened(node: dict[str, Any]) -> dict[str, Any]:
    return {**node, "additionalProperties": True} if isinstance(node.get("properties"), dict) else node


def test_an_object_that_lists_its_properties_has_no_others() -> None:
    """Small models never stop adding some; every answer still fits the schema."""
    listed = {"properties": {"a": {"type": "object", "properties": {"b": {}}}}, "required": ["a"]}
    closed = made(listed)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["a"]["additionalProperties"] is False
    for more in (
        {"additionalProperties": True},
        {"allOf": [{"required": ["c"]}]},
        {"anyOf": [{}]},
        {"required": ["z"]},
    ):
        assert made({**listed, **more}).get("additionalProperties") is not False
    parts = made({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]})
    assert all("additionalProperties" not in part for part in parts["allOf"])


def test_true_is_any_json() -> None:
    assert made(True) == {}


def test_notes_for_llguidance_cannot_loosen_a_schema() -> None:
    assert made({"x-guidance": {"lenient": True}, "type": "null"}) == {"type": "null"}


def test_formats_of_somebody_are_notes() -> None:
    assert made({"type": "string", "format": "my-own"}) == {"type": "string"}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "date",
            "2024-02-29 2000-02-29 2023-12-31 1999-04-30",
            "2023-02-29 1900-02-29 2023-04-31 0000-01-01 2023-13-01",
        ),
        ("time", "00:00:00Z 23:59:59.123+05:30", "24:00:00Z 10:47:60Z 10:47:00"),
        ("date-time", "2024-02-29T10:00:00Z", "2023-02-29T10:00:00Z 2024-01-01"),
        ("uuid4", "123e4567-e89b-42d3-a456-426614174000", "123e4567-e89b-12d3-a456-426614174000"),
    ],
)
def test_formats_hold_what_calendars_hold(name: str, good: str, bad: str) -> None:
    pattern = made({"type": "string", "format": name})["allOf"][0]["pattern"]
    assert all(re.search(pattern, text) for text in good.split())
    assert not any(re.search(pattern, text) for text in bad.split())


def test_a_format_beside_a_pattern_holds_too() -> None:
    schema = made({"format": "date", "pattern": "^20"})
    assert schema["pattern"] == "^20"
    assert len(schema["allOf"]) == 1


def test_alternatives_that_look_around_are_left_out() -> None:
    number, text = {"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}
    assert made({"anyOf": [number, text, {"type": "null"}]}) == {"anyOf": [number, {"type": "null"}]}
    assert made({"anyOf": [text]}) == {"anyOf": [text]}


def test_names_of_properties_become_properties() -> None:
    schema = {
        "$defs": {"c": {"enum": ["a", "b"]}},
        "propertyNames": {"$ref": "#/$defs/c"},
        "additionalProperties": {"type": "null"},
    }
    found = made(schema)
    assert found["properties"] == {"a": {"type": "null"}, "b": {"type": "null"}}
    assert found["additionalProperties"] is False
    assert "propertyNames" not in found


def test_what_others_look_at_is_not_unevaluated() -> None:
    base = {"$defs": {"base": {"properties": {"a": {}}}}, "allOf": [{"$ref": "#/$defs/base"}], "properties": {"b": {}}}
    found = made({**base, "unevaluatedProperties": False})
    assert (
        list(found["properties"]) == ["b", "a"]
        or list(found["properties"]) == ["a", "b"]
        or set(found["properties"]) == {"a", "b"}
    )
    assert found["additionalProperties"] is False
    assert "unevaluatedProperties" in made({**base, "anyOf": [{}], "unevaluatedProperties": False})


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf are too large"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf are too large"),
        ({"patternProperties": {f"^a{i:03}": {} for i in range(100)}}, "patternProperties have 100 entries"),
        ({"properties": {f"a{i}": {} for i in range(3000)}}, "properties have 3000 entries"),
        ({"$defs": {f"a{i}": {} for i in range(2000)}}, "defs have 2000 entries"),
    ],
)
def test_what_would_compile_for_long_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(BadGrammar, match=says):
        made(schema)


@pytest.mark.parametrize("step", [0.01, 0.25, 5, 60, 1000, 1e-10, 7])
def test_usual_steps_are_taken(step: float) -> None:
    assert made({"type": "number", "multipleOf": step})["multipleOf"] == step


SETS = {"type": "array", "uniqueItems": True}


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        (SETS, '["a", "b"]', True),
        (SETS, '["a", "a"', False),
        (SETS, '["a", "a b"]', True),
        (SETS, '["\\"", "\\""', False),
        (SETS, "[1, 10, 1,", False),
        (SETS, "[1, 1.0]", False),
        (SETS, '[{"a": 1, "b": 2}, {"b": 2, "a": 1}', False),
        (SETS, "[[1], [1]", False),
        (SETS, "[[1, 1]]", True),
        ({**SETS, "uniqueItems": False}, "[1, 1]", True),
        ({**SETS, "items": {"enum": ["ab", "ac"]}}, '["ab", "ab', False),
        ({**SETS, "items": {"enum": ["ab", "ac"]}}, '["ab", "ac"]', True),
        ({**SETS, "items": {"enum": ["ab", "ac"]}}, '["ab", "ac",', False),
        ({**SETS, "items": {"type": "boolean"}}, "[true, t", False),
        ({**SETS, "items": {"minimum": 1, "maximum": 10, "type": "integer"}}, "[1, 1", True),
        ({**SETS, "items": {"minimum": 1, "maximum": 9, "type": "integer"}}, "[1, 1", False),
        ({"properties": {"s": SETS, "l": {"type": "array"}}}, '{"l": [1, 1], "s": [1, 1]', False),
        ({"properties": {"s": SETS, "l": {"type": "array"}}}, '{"l": [1, 1], "s": [1, 2]}', True),
        ({"$defs": {"s": SETS}, "anyOf": [{"type": "null"}, {"$ref": "#/$defs/s"}]}, "[1, 1]", False),
        ({"items": SETS}, "[[1, 2], [1, 2], [3, 3]", False),
        (
            {"$defs": {"n": {"properties": {"s": SETS, "n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
            '{"n": {"n": {"s": [1, 1]',
            False,
        ),
    ],
)
def test_unique_items_are_watched(schema: Any, text: str, fits: bool) -> None:
    for size in (1, 3, len(text)):
        watched = UniqueItems(schema)
        found = []
        for piece in (text.encode()[at : at + size] for at in range(0, len(text), size)):
            found.append(watched.fits(piece))
            watched.take(piece)
        assert all(found) is fits
        assert all(found[:-1]) or size == 1


def test_schemas_that_refer_to_each_other_many_times_over_are_read_once() -> None:
    def chain(keyword: str) -> Any:
        levels = {f"x{i}": {keyword: [{"$ref": f"#/$defs/x{i + 1}"}] * 10} for i in range(30)}
        return {**levels, "x30": {"type": ["array", "null"], "uniqueItems": True}}

    watched = UniqueItems({"$defs": chain("anyOf"), "items": {"$ref": "#/$defs/x0"}, **SETS})
    assert watched.fits(b"[[1], [1, 2]")
    assert not watched.fits(b"[[1, 1]")
    made({"$defs": chain("allOf"), "$ref": "#/$defs/x0", "unevaluatedProperties": False})


@pytest.mark.parametrize("schema", [{"allOf": 3, "format": "date"}, {"properties": [], "unevaluatedProperties": False}])
def test_keywords_of_a_wrong_type_are_refused(schema: Any) -> None:
    with pytest.raises(BadGrammar, match="wrong type"):
        made(schema)
