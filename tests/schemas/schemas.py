"""Schemas that answers are held to: each kind that people send, and each keyword that describes a value."""

import datetime as dt
import decimal
import enum
import ipaddress
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Schema = Any


def obj(required: bool = True, **properties: Schema) -> Schema:
    made = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**made, "required": list(properties)} if required else made


def ref(name: str, **more: Schema) -> Schema:
    return {"$ref": f"#/$defs/{name}", **more}


STRING, INTEGER, NUMBER, BOOLEAN, NULL = ({"type": t} for t in ("string", "integer", "number", "boolean", "null"))
SHORT = {"type": "string", "maxLength": 12}

TYPES = {
    "string": SHORT,
    "integer": {"type": "integer", "minimum": -1000, "maximum": 1000},
    "number": {"type": "number", "minimum": -10, "maximum": 10},
    "boolean": BOOLEAN,
    "null": NULL,
    "array": {"type": "array", "items": BOOLEAN, "maxItems": 3},
    "object": obj(a=BOOLEAN),
    "list-with-null": {"type": ["string", "null"], "maxLength": 12},
    "list-of-three": {"type": ["boolean", "null", "integer"], "minimum": 0, "maximum": 9},
    "list-with-array": {"type": ["array", "null"], "items": {"enum": [1, 2]}, "maxItems": 2},
    "list-with-object": {"type": ["object", "null"], "properties": {"a": BOOLEAN}, "additionalProperties": False},
    "nullable-in-object": obj(a={"type": ["integer", "null"], "minimum": 0, "maximum": 5}),
}

ENUMS = {
    "enum-strings": {"enum": ["red", "green", "blue"]},
    "enum-of-one": {"enum": ["only"]},
    "enum-mixed": {"enum": ["a", 1, 2.5, None, True, False]},
    "enum-quotes": {"enum": ['say "hi"', "back\\slash", "line\nbreak", "tab\t", "slash/"]},
    "enum-unicode": {"enum": ["é", "漢字", "🙂", "ñandú", "\u2028"]},
    "enum-control": {"enum": ["\x00", "\x1f", "\x7f"]},
    "enum-empty-string": {"enum": ["", " ", "  "]},
    "enum-prefixes": {"enum": ["a", "ab", "abc", "abcd"]},
    "enum-objects": {"enum": [{"a": 1}, {"b": [1, 2]}, {}]},
    "enum-arrays": {"enum": [[], [1], ["x", None]]},
    "enum-numbers": {"enum": [0, -1, 1.5, 100]},
    "enum-typed": {"type": "string", "enum": ["x", "y", 3]},
    "enum-many": {"enum": [f"value {i}" for i in range(300)]},
    "enum-markup": {"enum": ["<b>", "</s>", "<|im_end|>", "&amp;", "{{x}}", "%s"]},
    "const-string": {"const": "fixed"},
    "const-quotes": {"const": 'a"b\\c\n'},
    "const-unicode": {"const": "naïve 漢 🙂"},
    "const-number": {"const": 3.25},
    "const-negative": {"const": -7},
    "const-null": {"const": None},
    "const-true": {"const": True},
    "const-object": {"const": {"a": [1, "é", None], "b": {"c": False}}},
    "const-array": {"const": [1, [2, [3]]]},
    "const-in-object": obj(kind={"const": "circle"}, radius={"type": "integer", "minimum": 1, "maximum": 99}),
}

NUMBERS = {
    "minimum": {"type": "integer", "minimum": 5, "maximum": 500},
    "maximum": {"type": "integer", "minimum": -99, "maximum": -3},
    "exclusive-minimum": {"type": "integer", "exclusiveMinimum": 0, "maximum": 20},
    "exclusive-maximum": {"type": "integer", "minimum": 0, "exclusiveMaximum": 20},
    "exclusive-both": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    "one-value": {"type": "integer", "minimum": 4, "maximum": 4},
    "wide-integers": {"type": "integer", "minimum": -(10**9), "maximum": 10**9},
    "large-integers": {"type": "integer", "minimum": 10**15, "maximum": 10**16},
    "unit-interval": {"type": "number", "minimum": 0, "maximum": 1},
    "open-interval": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "half-open-interval": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    "negative-interval": {"type": "number", "minimum": -2.5, "maximum": -0.5},
    "across-zero": {"type": "number", "minimum": -0.75, "maximum": 12.25},
    "number-one-bound": obj(a={"type": "number", "minimum": 0}),
    "integer-one-bound": obj(a={"type": "integer", "maximum": 0}),
    "multiple-of-7": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    "multiple-of-cent": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 100},
    "multiple-of-quarter": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 3},
    "both-kinds-of-bounds": {
        "type": "integer",
        "minimum": 0,
        "exclusiveMinimum": 2,
        "maximum": 9,
        "exclusiveMaximum": 8,
    },
    "float-bounds-on-integer": {"type": "integer", "minimum": 0.5, "maximum": 3.5},
    "free-integer": obj(a=INTEGER),
    "free-number": obj(a=NUMBER),
}

STRINGS = {
    "min-length": {"type": "string", "minLength": 3, "maxLength": 20},
    "max-length": {"type": "string", "maxLength": 5},
    "exact-length": {"type": "string", "minLength": 4, "maxLength": 4},
    "length-zero": {"type": "string", "maxLength": 0},
    "pattern-anchored": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "pattern-start": {"type": "string", "pattern": "^ab", "maxLength": 8},
    "pattern-end": {"type": "string", "pattern": "yz$", "maxLength": 8},
    "pattern-free": {"type": "string", "pattern": "[0-9]{3}", "maxLength": 9},
    "pattern-with-length": {"type": "string", "pattern": "^[a-z]+$", "minLength": 3, "maxLength": 6},
    "pattern-free-with-length": {"type": "string", "pattern": "b", "minLength": 3, "maxLength": 6},
    "pattern-alternatives": {"type": "string", "pattern": "^(cat|dog|bird)s?$"},
    "pattern-dot": {"type": "string", "pattern": "^.{8}$"},
    "pattern-negated": {"type": "string", "pattern": "^[^a]{3,6}$"},
    "pattern-classes": {"type": "string", "pattern": r"^\w{2,5}\s\d{1,3}$"},
    "pattern-complements": {"type": "string", "pattern": r"^\S{2,4}\D\W$"},
    "pattern-quote": {"type": "string", "pattern": '^"[a-z]{2}"$'},
    "pattern-backslash": {"type": "string", "pattern": r"^[a-c]\\[a-c]$"},
    "pattern-slash": {"type": "string", "pattern": "^/[a-z]{1,4}/$"},
    "pattern-hex": {"type": "string", "pattern": "^#[0-9a-fA-F]{6}$"},
    "pattern-phone": {"type": "string", "pattern": r"^\+?[0-9]{1,3}( [0-9]{2,4}){2,3}$"},
    "pattern-unicode": {"type": "string", "pattern": "^[äöü]{2,4}$"},
    "pattern-lazy": {"type": "string", "pattern": "^a+?b{1,3}?$", "maxLength": 10},
    "format-date": {"type": "string", "format": "date"},
    "format-time": {"type": "string", "format": "time"},
    "format-date-time": {"type": "string", "format": "date-time"},
    "format-uuid": {"type": "string", "format": "uuid"},
    "format-email": {"type": "string", "format": "email", "maxLength": 40},
    "format-ipv4": {"type": "string", "format": "ipv4"},
    "format-ipv6": {"type": "string", "format": "ipv6"},
    "format-hostname": {"type": "string", "format": "hostname", "maxLength": 40},
    "format-uri": {"type": "string", "format": "uri", "maxLength": 40},
    "format-duration": {"type": "string", "format": "duration", "maxLength": 20},
    "format-of-somebody": {"type": "string", "format": "my-own", "maxLength": 8},
    "format-openapi": obj(a={"type": "integer", "format": "int32", "minimum": 0, "maximum": 99}),
    "format-with-pattern": {"type": "string", "format": "date", "pattern": "^20"},
    "content": {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png", "maxLength": 12},
}

ARRAYS = {
    "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 5},
    "items-true": {"type": "array", "items": True, "maxItems": 2},
    "items-false": {"type": "array", "items": False},
    "items-empty": {"type": "array", "items": {}, "maxItems": 2},
    "no-items": {"type": "array", "maxItems": 2},
    "min-items": {"type": "array", "items": BOOLEAN, "minItems": 3, "maxItems": 6},
    "min-items-without-items": {"type": "array", "minItems": 2, "maxItems": 3},
    "max-items-zero": {"type": "array", "items": INTEGER, "maxItems": 0},
    "prefix-items": {"type": "array", "prefixItems": [SHORT, BOOLEAN], "items": False, "minItems": 2},
    "prefix-items-and-rest": {"type": "array", "prefixItems": [BOOLEAN], "items": {"enum": [1, 2]}, "maxItems": 4},
    "prefix-items-open": {"type": "array", "prefixItems": [{"enum": ["x"]}, NULL], "minItems": 1, "maxItems": 2},
    "nested": {"type": "array", "items": {"type": "array", "items": BOOLEAN, "maxItems": 2}, "maxItems": 3},
    "of-objects": {"type": "array", "items": obj(x={"type": "integer", "minimum": 0, "maximum": 99}), "maxItems": 3},
    "of-enums": {"type": "array", "items": {"enum": ["red", "rust", 17]}, "minItems": 3, "maxItems": 5},
    "unevaluated-items": {"type": "array", "prefixItems": [BOOLEAN], "unevaluatedItems": False},
}

OBJECTS = {
    "required": {"type": "object", "properties": {"a": BOOLEAN, "b": NULL}, "required": ["b"], "additionalProperties": False},
    "optional": obj(required=False, a=BOOLEAN, b=NULL, c={"enum": [1, 2]}),
    "empty": {"type": "object", "additionalProperties": False},
    "empty-key": {"type": "object", "properties": {"": BOOLEAN}, "required": [""], "additionalProperties": False},
    "odd-keys": obj(**{'a"b': BOOLEAN, "c\\d": NULL, "é 漢": BOOLEAN, "$ref": NULL, "/~": BOOLEAN}),
    "keyword-keys": obj(**{"type": BOOLEAN, "minimum": NULL, "not": BOOLEAN, "enum": NULL, "required": BOOLEAN}),
    "required-undeclared": {"type": "object", "required": ["z"], "additionalProperties": BOOLEAN, "maxProperties": 1},
    "additional-schema": {"type": "object", "additionalProperties": {"enum": [0, 1]}, "maxProperties": 2},
    "pattern-properties": {
        "type": "object", "patternProperties": {"^n_[a-z]{1,3}$": BOOLEAN}, "additionalProperties": False, "maxProperties": 2,
    },
    "min-properties": {
        "type": "object", "minProperties": 1, "maxProperties": 2, "patternProperties": {"^[a-z]{1,4}$": NULL},
        "additionalProperties": False,
    },
    "max-properties": {"type": "object", "maxProperties": 1, "additionalProperties": BOOLEAN},
    "property-names": {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,5}$"}, "additionalProperties": NULL, "maxProperties": 2},
    "property-names-listed": {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": BOOLEAN},
    "dependent-required": {**obj(required=False, a=BOOLEAN, b=BOOLEAN), "dependentRequired": {"a": ["b"]}},
    "dependent-schemas": {
        **obj(required=False, a=BOOLEAN, b={"type": ["boolean", "null"]}),
        "dependentSchemas": {"a": {"properties": {"b": NULL}, "required": ["b"]}},
    },
    "unevaluated-properties": {"type": "object", "properties": {"a": BOOLEAN}, "unevaluatedProperties": False},
    "unevaluated-with-all-of": {
        "type": "object", "allOf": [{"properties": {"a": BOOLEAN}, "required": ["a"]}], "properties": {"b": NULL},
        "unevaluatedProperties": False,
    },
    "nested-objects": obj(a=obj(b=obj(c=obj(d=BOOLEAN)))),
    "many-optional": obj(required=False, **{f"p{i}": BOOLEAN for i in range(40)}),
    "notes": {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.com/a", "title": "t",
        "description": "d", "$comment": "c", "examples": [{"a": True}], "default": {}, "deprecated": False, "readOnly": True,
        **obj(a={"type": "boolean", "title": "A", "default": False}),
    },
}  # fmt: skip

POINT = obj(x={"type": "integer", "minimum": 0, "maximum": 9}, y={"type": "integer", "minimum": 0, "maximum": 9})
DEFS = {"$defs": {"point": POINT, "colour": {"enum": ["red", "blue"]}, "small": {"type": "integer", "maximum": 100}}}

COMBINED = {
    "any-of": {"anyOf": [BOOLEAN, NULL]},
    "any-of-objects": {"anyOf": [obj(a=BOOLEAN), obj(b=NULL)]},
    "any-of-with-ref": {**DEFS, "anyOf": [ref("point"), ref("colour")]},
    "any-of-beside-type": {"type": "integer", "anyOf": [{"minimum": 5, "maximum": 7}, {"minimum": 90, "maximum": 99}]},
    "any-of-with-false": {"anyOf": [False, BOOLEAN]},
    "any-of-required": {
        **obj(required=False, a=BOOLEAN, b=BOOLEAN),
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "one-of": {"oneOf": [BOOLEAN, NULL, SHORT]},
    "one-of-tagged": {"oneOf": [obj(kind={"const": "a"}, n=BOOLEAN), obj(kind={"const": "b"}, m=NULL)]},
    "one-of-with-ref": {**DEFS, "oneOf": [ref("point"), ref("colour"), NULL]},
    "one-of-ranges": {
        "oneOf": [{"type": "integer", "minimum": 0, "maximum": 3}, {"type": "integer", "minimum": 7, "maximum": 9}]
    },
    "one-of-patterns": {
        "oneOf": [{"type": "string", "pattern": "^a{1,4}$"}, {"type": "string", "pattern": "^b{1,4}$"}]
    },
    "all-of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "all-of-objects": {
        "allOf": [
            {"type": "object", "properties": {"a": BOOLEAN}, "required": ["a"]},
            {"properties": {"b": NULL}, "required": ["b"]},
        ],
        "additionalProperties": True,
        "maxProperties": 2,
    },
    "all-of-with-ref": {**DEFS, "allOf": [ref("small"), {"minimum": 90}]},
    "all-of-patterns": {"type": "string", "allOf": [{"pattern": "^[a-f]+$"}, {"pattern": "e"}], "maxLength": 6},
    "all-of-enum": {"allOf": [{"enum": [1, 2, 3, 4]}, {"enum": [3, 4, 5]}]},
    "all-of-any-of": {
        "allOf": [
            {"anyOf": [{"type": "integer"}, NULL]},
            {"anyOf": [{"minimum": 0, "maximum": 5, "type": "integer"}, NULL]},
        ]
    },
    "ref": {**DEFS, **ref("point")},
    "ref-with-minimum": {**DEFS, **ref("small", minimum=95)},
    "ref-with-required": {"$defs": {"o": obj(required=False, a=BOOLEAN, b=NULL)}, **ref("o", required=["b"])},
    "ref-with-notes": {
        **DEFS,
        "type": "object",
        "properties": {"c": ref("colour", description="which", default="red")},
        "required": ["c"],
        "additionalProperties": False,
    },
    "ref-to-ref": {"$defs": {"a": ref("b"), "b": ref("c"), "c": BOOLEAN}, **ref("a")},
    "ref-definitions": {"definitions": {"a": BOOLEAN}, "$ref": "#/definitions/a"},
    "ref-into-properties": obj(a=BOOLEAN, b={"$ref": "#/properties/a"}),
    "ref-escaped": {"$defs": {"a/b~c": BOOLEAN}, "$ref": "#/$defs/a~1b~0c"},
    "ref-anchor": {"$defs": {"a": {"$anchor": "here", "type": "boolean"}}, "$ref": "#here"},
    "nested-defs": {
        "$defs": {"outer": {"$defs": {"inner": BOOLEAN}, **obj(a={"$ref": "#/$defs/outer/$defs/inner"})}},
        **ref("outer"),
    },
    "recursive-list": {
        "$defs": {"n": {**obj(required=False, v=BOOLEAN, next=ref("n")), "required": ["v"]}},
        **ref("n"),
    },
    "recursive-root": {
        "type": "object",
        "properties": {"v": BOOLEAN, "c": {"$ref": "#"}},
        "required": ["v"],
        "additionalProperties": False,
    },
    "recursive-tree": {
        "$defs": {"t": obj(v=BOOLEAN, c={"type": "array", "items": ref("t"), "maxItems": 1})},
        **ref("t"),
    },
    "true": True,
    "empty-schema": {},
    "any-object": {"type": "object"},
    "draft-7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"p": BOOLEAN},
        **obj(a={"$ref": "#/definitions/p"}),
    },
}

REFUSED = {
    "not": {"type": "integer", "not": {"const": 3}},
    "if": {"if": {"type": "integer"}, "then": {"minimum": 3}, "else": {"type": "null"}},
    "contains": {"type": "array", "contains": {"const": 1}, "maxItems": 3},
    "min-contains": {"type": "array", "contains": {"const": 1}, "minContains": 2, "maxItems": 3},
    "max-contains": {"type": "array", "contains": {"const": 1}, "maxContains": 1, "maxItems": 3},
    "dynamic-ref": {"$dynamicAnchor": "a", "properties": {"c": {"$dynamicRef": "#a"}}},
    "format-regex": {"type": "string", "format": "regex"},
    "lookahead": {"type": "string", "pattern": "^(?!a)[a-z]{3}$"},
}


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Score(Exact):
    value: float = Field(ge=0, le=1)
    label: str = Field(max_length=10)


class Money(Exact):
    amount: decimal.Decimal = Field(ge=0, le=1000)
    currency: Literal["EUR", "USD"]


class FreeMoney(Exact):
    amount: decimal.Decimal


class Sets(Exact):
    numbers: set[Annotated[int, Field(ge=0, le=9)]] = Field(max_length=4)
    names: frozenset[Annotated[str, Field(max_length=5)]] = Field(max_length=3)
    colours: set[Colour]


class Maybe(Exact):
    a: bool | None = None
    b: Annotated[str, Field(max_length=6)] | None
    c: int | bool = Field(False, le=5, ge=0)


class Node(Exact):
    name: Annotated[str, Field(max_length=6)]
    child: "Node | None" = None


class Tree(Exact):
    value: bool
    children: list["Tree"] = Field(max_length=1)


class Dates(Exact):
    day: dt.date
    moment: dt.datetime
    clock: dt.time
    id: uuid.UUID
    id4: Annotated[uuid.UUID, Field(json_schema_extra={"format": "uuid4"})]
    address: ipaddress.IPv4Address


class Anything(Exact):
    kind: Literal["x"]
    value: Any


class Keyed(Exact):
    by_colour: dict[Colour, bool]
    by_word: dict[Annotated[str, Field(pattern="^[a-z]{1,4}$")], bool] = Field(max_length=2)
    pair: tuple[bool, Annotated[int, Field(ge=0, le=5)]]


class Circle(Exact):
    kind: Literal["circle"]
    radius: int = Field(ge=1, le=9)


class Square(Exact):
    kind: Literal["square"]
    side: int = Field(ge=1, le=9)


class Drawing(Exact):
    shapes: list[Annotated[Circle | Square, Field(discriminator="kind")]] = Field(min_length=1, max_length=2)
    best: Score
    colour: Colour = Colour.RED


class Receipt(BaseModel):
    """Open to more fields, as pydantic's models are by default."""

    shop: str = Field(max_length=20)
    total: float = Field(gt=0, lt=10_000)
    paid: bool


PYDANTIC = {
    f"pydantic-{model.__name__.lower()}": model.model_json_schema()
    for model in (Score, Money, FreeMoney, Sets, Maybe, Node, Tree, Dates, Anything, Keyed, Drawing, Receipt)
}

UNIQUE = {
    "unique-strings": {
        "type": "array",
        "items": {"type": "string", "maxLength": 3},
        "uniqueItems": True,
        "maxItems": 4,
    },
    "unique-enums": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "uniqueItems": True, "minItems": 2},
    "unique-booleans": {"type": "array", "items": BOOLEAN, "uniqueItems": True},
    "unique-integers": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 4}, "uniqueItems": True},
    "unique-in-object": obj(
        tags={"type": "array", "items": {"enum": ["a", "ab", "abc"]}, "uniqueItems": True, "minItems": 3}
    ),
    "unique-by-ref": {
        "$defs": {"c": {"enum": [1, 2, None]}},
        "type": "array",
        "items": ref("c"),
        "uniqueItems": True,
        "minItems": 3,
    },
}

SCHEMAS: dict[str, Schema] = {
    **TYPES, **ENUMS, **NUMBERS, **STRINGS, **ARRAYS, **OBJECTS, **COMBINED, **PYDANTIC, **UNIQUE, **REFUSED
}  # fmt: skip
