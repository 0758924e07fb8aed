r"""GBNF, llama.cpp's grammar language (its `grammars/README.md`), written as the Lark grammar that llguidance reads.

llguidance's converter, `gbnf_to_lark`, joins rules to lexemes, which are greedy: `word ::= [a-z]+` followed by `"x"`
never ends. It also writes `\u0041` and `\[` in ways that llguidance refuses. Here every character is a lexeme, which is
exact. Only literals whose first character nothing else in the grammar can match stay whole, to save steps.
"""

from __future__ import annotations

import json
import re
from functools import partial

from opsin.core.errors import BadGrammar

MAX_DEPTH = 64
# llguidance recurses from rule to rule: a chain of 3,000 rules overflows a stack of 8 MB.
MAX_RULES = 500
# llguidance takes an upper bound over this as it is, and longer for each step.
MAX_REPETITIONS = 2000

_ESCAPE = r'\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[nrt\\"\[\]])'
_CHARACTER = re.compile(rf"{_ESCAPE}|.", re.DOTALL)
_RANGE = re.compile(rf"({_ESCAPE}|.)(?:-({_ESCAPE}|.))?", re.DOTALL)
_TOKEN = re.compile(
    rf"""(?P<blank>\s+|\#[^\r\n]*) | (?P<rule>[A-Za-z0-9_-]+)\s*::= | (?P<name>[A-Za-z0-9_-]+)
    | "(?P<literal>(?:{_ESCAPE}|[^"\\])*)" | (?P<set>\[(?:{_ESCAPE}|[^\]\\])*\]|\.)
    | (?P<repeat>[*+?]|\{{\s*\d+\s*(?:,\s*\d*\s*)?\}}) | (?P<mark>[()|])""",
    re.VERBOSE,
)
_quoted = partial(json.dumps, ensure_ascii=False)
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}


def to_lark(gbnf: str) -> str:
    """The grammar in Lark's syntax, with `start` for `root`. Raises BadGrammar."""
    tokens = _tokens(gbnf)
    rules = dict.fromkeys(text for kind, text, _ in tokens if kind == "rule")
    names = {name: f"r{number}" for number, name in enumerate(rules)} | {"root": "start"}
    if len(names) > MAX_RULES:
        raise _refused(f"it has {len(names)} rules, and {MAX_RULES} are the limit")
    whole = _whole(tokens)
    lines: dict[str, str] = {}
    groups: list[list[list[str]]] = []  # those that are open, the rule first: alternatives, each a list of parts
    rule = ""
    for kind, text, offset in [*tokens, ("end", "", len(gbnf))]:
        parts = groups[-1][-1] if groups else []
        match kind:
            case "rule" | "end" if len(groups) < 2:
                if groups:
                    lines[rule] = f"{names[rule]}: {_joined(groups.pop(), whole)}\n"
                if text in lines:
                    raise _refused(f"it defines the rule {text} twice")
                rule, groups = text, [[[]]]
            case _ if not groups:
                raise _unexpected(gbnf, offset)
            case "literal":
                text = _unescaped(text)
                one = len(text) < 2 or _quoted(text) in whole
                parts.append(_quoted(text) if one else f"({' '.join(map(_quoted, text))})")
            case "set":
                parts.append(f"/{_as_set(text)}/")
            case "name" if text in names:
                parts.append(names[text])
            case "name":
                raise _refused(f"it names the rule {text}, which it does not define")
            case "repeat" if parts and parts[-1][-1] not in "*+?}":
                parts[-1] += _repetition(text)
            case "mark" if text == "|":
                groups[-1].append([])
            case "mark" if text == "(":
                if len(groups) > MAX_DEPTH:
                    raise _refused(f"it is nested more than {MAX_DEPTH} deep")
                groups.append([[]])
            case "mark" if len(groups) > 1:
                closed = _joined(groups.pop(), whole)
                groups[-1][-1].append(f"({closed})")
            case _:
                raise _unexpected(gbnf, offset)
    if "root" not in lines:
        raise _refused("it has no rule named root")
    return "".join(lines.values())


def _tokens(gbnf: str) -> list[tuple[str, str, int]]:
    """Kind, text and offset of each token."""
    tokens, offset = [], 0
    while offset < len(gbnf):
        match = _TOKEN.match(gbnf, offset)
        if match is None or match.lastgroup is None:
            raise _unexpected(gbnf, offset)
        if match.lastgroup != "blank":
            tokens.append((match.lastgroup, match[match.lastgroup], offset))
        offset = match.end()
    return tokens


def _whole(tokens: list[tuple[str, str, int]]) -> dict[str, str]:
    """Literals that can stay one lexeme, by the way they are written in Lark."""
    texts = {_unescaped(text) for kind, text, _ in tokens if kind == "literal"} - {""}
    sets = {_as_set(text) for kind, text, _ in tokens if kind == "set"}
    lengths = {len(text) for text in texts}
    return {
        _quoted(text): text
        for text in texts
        if not any(text[:length] in texts for length in lengths if length < len(text))
        and not any(re.match(one, text[0]) for one in sets)
    }


def _joined(alternatives: list[list[str]], whole: dict[str, str]) -> str:
    found = [" ".join(parts) or '""' for parts in alternatives]
    if len(found) > 1 and all(one in whole for one in found):
        # A list of words is one lexeme: llguidance compares each alternative of a rule with all others.
        return "/" + "|".join(re.sub(r"\W", _code_point, whole[one]) for one in found) + "/"
    return " | ".join(found)


def _unexpected(gbnf: str, offset: int) -> BadGrammar:
    line = gbnf.count("\n", 0, offset) + 1
    found = gbnf[offset : offset + 20].split("\n", 1)[0]
    return _refused(f"{found!r} in line {line} is not expected" if found else f"it ends too early, in line {line}")


def _repetition(text: str) -> str:
    if any(len(bound) > 4 or int(bound) > MAX_REPETITIONS for bound in re.findall(r"\d+", text)):
        raise _refused(f"it repeats something {text[:20]} times, and {MAX_REPETITIONS} are the limit")
    return re.sub(r"\s", "", text)


def _character(text: str) -> str:
    """The character that an escape, or a character itself, stands for."""
    code = int(text[2:], 16) if len(text) > 2 else ord(_NAMED.get(text[1:], text[-1]))  # noqa: FURB166
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise _refused(f"{text!r} is no character")
    return chr(code)


def _unescaped(text: str) -> str:
    return "".join(map(_character, _CHARACTER.findall(text)))


def _as_set(text: str) -> str:
    """One character out of ranges, or out of all others, as a regular expression for Python and for llguidance."""
    negated = text.startswith("[^")
    ranges = [(_character(low), _character(high or low)) for low, high in _RANGE.findall(text[1 + negated : -1])]
    if backwards := [f"{low}-{high}" for low, high in ranges if high < low]:
        raise _refused(f"the range {backwards[0]} runs backwards")
    if not ranges:
        return "(?s:.)" if negated or text == "." else r"[^\x00-\U0010FFFF]"
    return f"[{'^' * negated}{''.join(f'{_code_point(low)}-{_code_point(high)}' for low, high in ranges)}]"


def _code_point(found: str | re.Match[str]) -> str:
    return f"\\U{ord(found[0]):08X}"


def _refused(reason: str) -> BadGrammar:
    return BadGrammar(f"The grammar cannot be used: {reason}.")
