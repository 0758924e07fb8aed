r"""GBNF, llama.cpp's grammar language (its `grammars/README.md`), written as the Lark grammar that llguidance reads.

llguidance's converter, `gbnf_to_lark`, joins rules to lexemes, which are greedy: `word ::= [a-z]+` followed by `"x"`
never ends. It also writes `\u0041` and `\[` in ways that llguidance refuses. Here every character is a lexeme, which is
exact. Only literals whose first character nothing else in the grammar can match stay whole, to save steps.
"""

import itertools
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
    """The grammar in Lark's syntax, with `start` for `root`. Raises BadGrammar; llguidance checks the structure."""
    tokens = _tokens(gbnf)
    rules = [text for kind, text in tokens if kind == "rule"]
    if len(rules) > MAX_RULES:
        raise _refused(f"it has {len(rules)} rules, and {MAX_RULES} are the limit")
    if missing := {"root", *(text for kind, text in tokens if kind == "name")} - set(rules):
        raise _refused(f"it does not define the rule {min(missing)}")
    names = {name: f"r{number}" for number, name in enumerate(rules)} | {"root": "start"}
    whole = _whole(tokens)
    lark = [_written(kind, text, names, whole) for kind, text in tokens]
    marks = "".join(_mark(kind, text, whole) for kind, text in tokens)
    depths = itertools.accumulate((mark == "(") - (mark == ")") for mark in marks)
    if max(depths, default=0) > MAX_DEPTH:
        raise _refused(f"it is nested more than {MAX_DEPTH} deep")
    # A list of words is one lexeme: llguidance compares each alternative of a rule with all others.
    for run in reversed(list(re.finditer(r"(?<=[:(|])w(?:\|w)+(?![^:|)])", marks))):
        words = (re.sub(r"\W", _code_point, _unescaped(text)) for _, text in tokens[run.start() : run.end() : 2])
        lark[run.start() : run.end()] = [f"/{'|'.join(words)}/"]
    return " ".join(lark)


def _written(kind: str, text: str, names: dict[str, str], whole: set[str]) -> str:
    match kind:
        case "rule":
            return f"\n{names[text]}:"
        case "name":
            return names[text]
        case "set":
            return f"/{_as_set(text)}/"
        case "repeat":
            if any(len(bound) > 4 or int(bound) > MAX_REPETITIONS for bound in re.findall(r"\d+", text)):
                raise _refused(f"it repeats something {text[:20]} times, and {MAX_REPETITIONS} are the limit")
            return re.sub(r"\s", "", text)
        case "literal":
            literal = _unescaped(text)
            return _quoted(literal) if len(literal) < 2 or literal in whole else f"({' '.join(map(_quoted, literal))})"
    return text


def _mark(kind: str, text: str, whole: set[str]) -> str:
    """One character for a token: w for a word, a colon for the beginning of a rule, itself for ( | and )."""
    if kind == "literal" and _unescaped(text) in whole:
        return "w"
    return {"rule": ":", "mark": text}.get(kind, "x")


def _tokens(gbnf: str) -> list[tuple[str, str]]:
    """Kind and text of each token."""
    tokens, offset = [], 0
    while offset < len(gbnf):
        match = _TOKEN.match(gbnf, offset)
        if match is None or match.lastgroup is None:
            line, found = gbnf.count("\n", 0, offset) + 1, gbnf[offset : offset + 20].split("\n", 1)[0]
            raise _refused(f"{found!r} in line {line} is not expected")
        if match.lastgroup != "blank":
            tokens.append((match.lastgroup, match[match.lastgroup]))
        offset = match.end()
    return tokens


def _whole(tokens: list[tuple[str, str]]) -> set[str]:
    """Literals that can stay one lexeme."""
    texts = {_unescaped(text) for kind, text in tokens if kind == "literal"} - {""}
    sets = {_as_set(text) for kind, text in tokens if kind == "set"}
    lengths = {len(text) for text in texts}
    return {
        text
        for text in texts
        if not any(text[:length] in texts for length in lengths if length < len(text))
        and not any(re.match(one, text[0]) for one in sets)
    }


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
