r"""GBNF, llama.cpp's grammar language, written as the Lark grammar that llguidance reads.

llguidance ships a converter, `gbnf_to_lark`, which is not used: it joins rules to lexemes, and llguidance's lexemes
are greedy, so that `word ::= [a-z]+` followed by `"x"` never ends (nor does llama.cpp's own arithmetic.gbnf); it also
writes `\u0041` and `\[` in ways that llguidance refuses. Here every character is a lexeme of its own, which is exact.
Only literals whose first character nothing else in the grammar can match stay whole: the same language, fewer steps.

Source of the language: llama.cpp's `grammars/README.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from opsin.core.errors import BadGrammar

MAX_DEPTH = 64
# llguidance recurses from rule to rule: a chain of 3,000 rules overflows a stack of 8 MB.
MAX_RULES = 500
# llguidance takes an upper bound over this as it is, and longer for each step.
MAX_REPETITIONS = 2000

_TOKEN = re.compile(
    r"""(?P<blank>[ \t]+|\#[^\r\n]*) | (?P<newline>\r\n?|\n) | (?P<rule>[A-Za-z0-9_-]+)(?=[ \t]*::=)
    | (?P<name>[A-Za-z0-9_-]+) | (?P<define>::=) | "(?P<literal>(?:\\.|[^"\\])*)" | \[(?P<set>(?:\\.|[^\]\\])*)\]
    | (?P<any>\.) | \{\s*(?P<bounds>\d+\s*(?:,\s*\d*\s*)?)\} | (?P<mark>[()|*+?])""",
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(
    r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\([nrt\\\"\[\]])|([^\\])", re.DOTALL
)
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}
_LAST_CHARACTER = 0x10FFFF

Tokens = list[tuple[str, str, int]]  # kind, text, place in the grammar


@dataclass(frozen=True, slots=True)
class _Set:
    """One character out of ranges of code points, or out of all others."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool

    def holds(self, character: str) -> bool:
        return any(low <= ord(character) <= high for low, high in self.ranges) is not self.negated

    def __str__(self) -> str:
        inner = "".join(f"\\x{{{low:X}}}-\\x{{{high:X}}}" for low, high in self.ranges)
        if not inner:
            return "/(?s:.)/" if self.negated else "/[^\\x{0}-\\x{10FFFF}]/"
        return f"/[{'^' if self.negated else ''}{inner}]/"


_ANY = _Set((), negated=True)


def to_lark(gbnf: str) -> str:
    """The grammar in Lark's syntax, with `start` for `root`. Raises BadGrammar."""
    tokens = list(_tokens(gbnf))
    rules = [text for kind, text, _ in tokens if kind == "rule"]
    if "root" not in rules:
        raise _refused("it has no rule named root")
    if len(set(rules)) > MAX_RULES:
        raise _refused(f"it has {len(set(rules))} rules, and {MAX_RULES} are the limit")
    twice = next((name for name in rules if rules.count(name) > 1), None)
    if twice is not None:
        raise _refused(f"it defines the rule {twice} twice")
    return _Writer(gbnf, tokens, rules).written()


def _refused(reason: str) -> BadGrammar:
    return BadGrammar(f"The grammar cannot be used: {reason}.")


def _tokens(gbnf: str) -> Iterator[tuple[str, str, int]]:
    place = depth = 0
    while place < len(gbnf):
        match = _TOKEN.match(gbnf, place)
        if match is None or match.lastgroup is None:
            raise _unexpected(gbnf, place)
        kind, text = match.lastgroup, match[match.lastgroup]
        depth += {"(": 1, ")": -1}.get(text, 0) if kind == "mark" else 0
        if depth > MAX_DEPTH:
            raise _refused(f"it is nested more than {MAX_DEPTH} deep")
        # A line ends a rule, except within brackets, where it is a blank.
        if kind != "blank" and not (kind == "newline" and depth > 0):
            yield kind, text, place
        place = match.end()


def _unexpected(gbnf: str, place: int) -> BadGrammar:
    line = gbnf.count("\n", 0, place) + 1
    found = gbnf[place : place + 20].split("\n", 1)[0]
    if not found:
        return _refused(f"it ends too early, in line {line}")
    if found.startswith("<"):
        return _refused(f"it names a token in angle brackets in line {line}, write its text in quotes")
    return _refused(f"{found!r} in line {line} is not expected there")


def _characters(text: str, gbnf: str, place: int) -> list[tuple[str, bool]]:
    """Characters, and whether each was escaped."""
    found, at = [], 0
    while at < len(text):
        match = _CHARACTER.match(text, at)
        code = match and (match[1] or match[2] or match[3])
        if match is None or (code and not _is_character(int(code, 16))):
            raise _unexpected(gbnf, place + 1 + at)
        plain = chr(int(code, 16)) if code else match[5] or _NAMED.get(match[4], match[4])
        found.append((plain, match[5] is None))
        at = match.end()
    return found


def _is_character(code: int) -> bool:
    return code <= _LAST_CHARACTER and not 0xD800 <= code <= 0xDFFF


def _as_set(text: str, gbnf: str, place: int) -> _Set:
    negated = text.startswith("^")
    characters = _characters(text[negated:], gbnf, place + negated)
    ranges, at = [], 0
    while at < len(characters):
        low = high = ord(characters[at][0])
        if characters[at + 1 : at + 2] == [("-", False)] and at + 2 < len(characters):
            high, at = ord(characters[at + 2][0]), at + 2
        if high < low:
            raise _refused(f"the range {chr(low)}-{chr(high)} runs backwards")
        ranges.append((low, high))
        at += 1
    return _Set(tuple(ranges), negated)


class _Writer:
    """Reads a grammar's tokens once, in order, and writes each rule as it goes."""

    def __init__(self, gbnf: str, tokens: Tokens, rules: Iterable[str]) -> None:
        self._gbnf = gbnf
        self._tokens = tokens
        self._at = 0
        self._names = {name: f"r{number}" for number, name in enumerate(rules)} | {"root": "start"}
        self._literals = {
            place: "".join(character for character, _ in _characters(text, gbnf, place))
            for kind, text, place in tokens
            if kind == "literal"
        }
        self._sets = {place: _as_set(text, gbnf, place) for kind, text, place in tokens if kind == "set"}
        sets = {*self._sets.values(), *([_ANY] if any(kind == "any" for kind, _, _ in tokens) else [])}
        texts = set(self._literals.values()) - {""}
        lengths = {len(text) for text in texts}
        self._whole = {
            text
            for text in texts
            if not any(one.holds(text[0]) for one in sets)
            and not any(text[:length] in texts for length in lengths if length < len(text))
        }
        self._words = {_quoted(text): text for text in self._whole}

    def written(self) -> str:
        lines: list[str] = []
        while self._skip_lines():
            kind, name, place = self._tokens[self._at]
            if kind != "rule":
                raise _unexpected(self._gbnf, place)
            self._at += 2  # the name and the sign behind it
            self._skip_lines()
            lines.append(f"{self._names[name]}: {self._alternatives()}")
        return "\n".join(lines) + "\n"

    def _skip_lines(self) -> bool:
        while self._kind() == "newline":
            self._at += 1
        return self._at < len(self._tokens)

    def _kind(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def _takes(self, mark: str) -> bool:
        taken = self._at < len(self._tokens) and self._tokens[self._at][:2] == ("mark", mark)
        self._at += taken
        return taken

    def _alternatives(self) -> str:
        found = [self._sequence()]
        while self._takes("|"):
            self._skip_lines()
            found.append(self._sequence())
        if len(found) > 1 and all(len(parts) == 1 and parts[0] in self._words for parts in found):
            # A list of words is one lexeme: llguidance compares each alternative of a rule with all others.
            return "/" + "|".join(_escaped(self._words[parts[0]]) for parts in found) + "/"
        return " | ".join(" ".join(parts) or '""' for parts in found)

    def _sequence(self) -> list[str]:
        parts: list[str] = []
        while (part := self._atom()) is not None:
            parts.append(part + self._repeated())
        return parts

    def _atom(self) -> str | None:
        """What a sequence is made of; None at its end."""
        kind, text, place = self._tokens[self._at] if self._at < len(self._tokens) else ("", "", 0)
        part: str | None = None
        match kind:
            case "literal":
                part = self._literal(self._literals[place])
            case "set":
                part = str(self._sets[place])
            case "any":
                part = str(_ANY)
            case "name" if text in self._names:
                part = self._names[text]
            case "name":
                raise _refused(f"it names the rule {text}, which it does not define")
            case "mark" if text == "(":
                return self._group()
            case "define" | "bounds" | "mark" if text not in {"|", ")"}:
                raise _unexpected(self._gbnf, place)
        self._at += part is not None
        return part

    def _group(self) -> str:
        self._at += 1
        inner = self._alternatives()
        if not self._takes(")"):
            raise _unexpected(self._gbnf, self._tokens[self._at][2] if self._kind() else len(self._gbnf))
        return f"({inner})"

    def _literal(self, text: str) -> str:
        if len(text) < 2 or text in self._whole:
            return _quoted(text)
        return f"({' '.join(map(_quoted, text))})"

    def _repeated(self) -> str:
        if self._kind() == "bounds":
            bounds = re.sub(r"\s", "", self._tokens[self._at][1])
            self._at += 1
            if any(len(bound) > 4 or int(bound or 0) > MAX_REPETITIONS for bound in bounds.split(",")):
                raise _refused(f"it repeats something {bounds[:20]} times, and {MAX_REPETITIONS} are the limit")
            return f"{{{bounds}}}"
        return next((mark for mark in "*+?" if self._takes(mark)), "")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return re.sub("[^A-Za-z0-9]", lambda match: f"\\x{{{ord(match[0]):X}}}", text)
