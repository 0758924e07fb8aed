"""Schemas and grammars of a few hundred bytes that held an engine for seconds or for ever."""

import json
from typing import Any


def doubling(n: int) -> str:
    rules = "\n".join(f'x{i} ::= x{i + 1} "p" | x{i + 1} "q"' for i in range(n))
    return f'root ::= "p" x0\n{rules}\nx{n} ::= "a"'


def squared(n: int) -> str:
    rules = "\n".join(f"x{i} ::= x{i + 1}? x{i + 1}?" for i in range(n))
    return f'root ::= x0 "."\n{rules}\nx{n} ::= [a-z]'


def pairs(n: int) -> Any:
    def pair(i: int, end: int) -> Any:
        items = [{"$ref": f"#/$defs/x{i + 1}"}, {"const": end}]
        return {"type": "array", "prefixItems": items, "minItems": 2, "maxItems": 2}

    defs = {f"x{i}": {"anyOf": [pair(i, 1), pair(i, 2)]} for i in range(n)} | {f"x{n}": {"const": 3}}
    return {"type": "object", "properties": {"a": {"$ref": "#/$defs/x0"}}, "required": ["a"], "$defs": defs}


def pattern(text: str) -> dict[str, str]:
    return {"json_schema": json.dumps({"type": "string", "pattern": text})}


HOSTILE: dict[str, dict[str, str]] = {
    "doubling": {"grammar": doubling(16)},
    "squared": {"grammar": squared(20)},
    "optional-1000": {"grammar": "root ::= " + '"a"? ' * 1000 + '"a"'},
    "optional-later": {"grammar": 'root ::= "b" ' + '"a"? ' * 2000 + '"a"'},
    "optional-13000": {"grammar": 'root ::= "b" ' + '"a"? ' * 13_000 + '"a"'},
    "optional-repeated": {"grammar": 'root ::= ([a-z]? [a-z]? [a-z]? [a-z]?){0,200} "."'},
    "repeated-thrice": {"grammar": 'root ::= ((([a-z]{0,100}) {0,100}){0,100} "."?)*'},
    "left-recursion": {"grammar": 'root ::= root root | "a" | ""'},
    "rules-in-a-chain": {
        "grammar": 'root ::= r0\nr499 ::= "b"\n' + "".join(f'r{i} ::= "a" r{i + 1}\n' for i in range(499))
    },
    "exponential-left-recursion": {
        "grammar": "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} | r{i + 1}\n" for i in range(60)) + 'r60 ::= "a"'
    },
    "any-text": {"grammar": "root ::= (.* .*)* .*"},
    "pattern-optional-300": pattern("^(a?b?c?){0,300}$"),
    "pattern-nested-100": pattern("^((a{0,100}){0,100}){0,100}$"),
    "pattern-400-of-400": pattern("^(a?){400}a{400}$"),
    "pattern-alternatives": pattern("^(a|aa|aaa|aaaa)*b$"),
    "pattern-remembers": pattern("(a|b)*a(a|b){20}$"),
    "pattern-deep": pattern("(" * 30_000 + ")" * 30_000),
    "pairs-15": {"json_schema": json.dumps(pairs(15))},
    "many-alternatives": {
        "json_schema": json.dumps(
            {"anyOf": [{"type": "object", "properties": {"a": {"const": i}}, "required": ["a"]} for i in range(800)]}
        )
    },
    "long-constant": {"json_schema": json.dumps({"const": "a" * 60_000})},
    "references-in-a-chain": {
        "json_schema": json.dumps(
            {
                "$defs": {f"x{i}": {"$ref": f"#/$defs/x{i + 1}"} for i in range(999)} | {"x999": {"const": 1}},
                "$ref": "#/$defs/x0",
            }
        )
    },
    "unevaluated-in-a-chain": {
        "json_schema": json.dumps(
            {
                "$defs": {
                    f"x{i}": {"allOf": [{"$ref": f"#/$defs/x{i + 1}"}], "unevaluatedProperties": False}
                    for i in range(999)
                }
                | {"x999": {"type": "object"}},
                "$ref": "#/$defs/x0",
            }
        )
    },
}
