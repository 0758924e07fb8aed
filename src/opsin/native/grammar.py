"""JSON schemas and GBNF grammars, checked before they come near the engine."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

from opsin.core.errors import BadGrammar
from opsin.native.library import library
from opsin.native.schema import normalise

MAX_CHARACTERS = 65_536
MAX_GBNF_CHARACTERS = 262_144
MAX_DEPTH = 64
# What passes in the child is compiled again by the engine's thread, so it must be cheap: both limits are tight.
COMPILE_CPU_SECONDS = 1
COMPILE_BYTES = 512 * 2**20
_WALL_SECONDS = 5
# llama.cpp takes a larger upper bound as none at all, without a word.
MAX_REPETITIONS = 2000
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#.*')
_UPPER_BOUND = re.compile(r"\{\s*\d*\s*,\s*(\d+)\s*\}")
_REASON_CHARACTERS = 200
_CHILD = Path(__file__).with_name("grammar_child.py")


def compile_schema(schema: str) -> str:
    """GBNF for a JSON schema. Raises BadGrammar. Remembered by text."""
    _check(schema, "JSON schema", "{[")
    return _compiled(normalise(schema), is_schema=True)


def compile_grammar(gbnf: str) -> str:
    """The same GBNF once it is known to compile. Raises BadGrammar. Remembered by text."""
    _check(gbnf, "grammar", "([")
    return _compiled(gbnf, is_schema=False)


def _check(text: str, what: str, openers: str) -> None:
    if not text.strip():
        raise BadGrammar(f"The {what} is empty: leave it out or give one.")
    if "\0" in text:
        raise BadGrammar(f"The {what} holds a NUL character: take it out.")
    if len(text) > MAX_CHARACTERS:
        raise BadGrammar(f"The {what} has {len(text)} characters, and {MAX_CHARACTERS} are the limit: make it shorter.")
    # Brackets in strings count too: a bound, not a parser.
    closers = {"{": "}", "[": "]", "(": ")"}
    depth = deepest = 0
    for character in text:
        if character in openers:
            depth += 1
            deepest = max(deepest, depth)
        elif any(character == closers[opener] for opener in openers):
            depth = max(0, depth - 1)
    if deepest > MAX_DEPTH:
        raise BadGrammar(f"The {what} is nested {deepest} deep, and {MAX_DEPTH} is the limit: make it flatter.")


@functools.lru_cache(maxsize=128)
def _compiled(text: str, *, is_schema: bool) -> str:
    what = "JSON schema" if is_schema else "grammar"
    lib = library()
    job = {
        "library": str(lib.path),
        "converter": str(Path(lib.llama.__file__).with_name("llama_grammar.py")),
        "schema": text if is_schema else None,
        "grammar": text,
        "seconds": COMPILE_CPU_SECONDS,
        "bytes": COMPILE_BYTES,
        "most": MAX_GBNF_CHARACTERS,
    }
    try:
        child = subprocess.run(  # noqa: S603 - our own script, run by our own interpreter
            [sys.executable, "-I", "-S", str(_CHILD)],
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BadGrammar(
            f"The {what} did not compile within {_WALL_SECONDS} s: make it simpler, with fewer alternatives."
        ) from error
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        answer = {}
    if child.returncode != 0 or not answer:
        raise BadGrammar(
            f"The {what} is too much for llama.cpp's grammar compiler (it takes too long or too much memory): "
            "make it simpler."
        )
    if "gbnf" in answer:
        _check_bounds(str(answer["gbnf"]), what)
        return str(answer["gbnf"])
    reason = str(answer["error"]) or _reason(child.stderr)
    raise BadGrammar(f"The {what} cannot be used: {reason[:_REASON_CHARACTERS].rstrip('.')}.")


def _check_bounds(gbnf: str, what: str) -> None:
    for bound in _UPPER_BOUND.findall(_QUOTED.sub("", gbnf)):
        if len(bound) > 9 or int(bound) > MAX_REPETITIONS:
            raise BadGrammar(
                f"The {what} repeats something up to {bound[:12]} times, and {MAX_REPETITIONS} are the limit: "
                "lower it, or leave the upper bound out."
            )


def _reason(stderr: bytes) -> str:
    """llama.cpp's complaint without the grammar that it repeats behind it."""
    for line in stderr.decode("utf-8", "replace").splitlines():
        match = re.search(r"error parsing grammar: (.*)", line)
        if match and "no vocab" in match[1]:
            return "it names a token in angle brackets, which is not supported: write its text in quotes"
        if match:
            return match[1]
        if "root" in line or "left recursion" in line:
            return line
    return "llama.cpp refuses it; a grammar needs a rule named root and no left recursion"
