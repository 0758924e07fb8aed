"""GBNF becomes Lark that means the same, or is refused with what is wrong in it."""

import re

import pytest

from opsin.core.errors import BadGrammar
from opsin.native.gbnf import MAX_DEPTH, MAX_RULES, to_lark


def body(gbnf: str) -> str:
    return re.sub(r" (?=[?*+{\n])", "", to_lark(gbnf)).strip()


@pytest.mark.parametrize(
    ("gbnf", "lark"),
    [
        ('root ::= "a"', 'start: "a"'),
        ('root ::= word "x"\nword ::= [a-z]+', 'start: r1 "x"\nr1: /[\\U00000061-\\U0000007A]/+'),
        ('root ::= "ab" [0-9]{2,3}', 'start: "ab" /[\\U00000030-\\U00000039]/{2,3}'),
        # What something else could begin with is taken character by character.
        ('root ::= "ab" [a-z]*', 'start: ("a" "b") /[\\U00000061-\\U0000007A]/*'),
        ('root ::= "ab" "abc"', 'start: "ab" ("a" "b" "c")'),
        ('root ::= "ab" .', 'start: ("a" "b") /(?s:.)/'),
        ('root ::= ("yes" | "no")? # {0,5000}', "start: ( /yes|no/ )?"),
        ('root ::= "yes"\n  | "no"', "start: /yes|no/"),
        ('root ::= (\n "a" # why\n b\n)\n\nb ::=\n "{0,5000}" |', 'start: ( "a" r1 )\nr1: "{0,5000}" |'),
        (r'root ::= "\u0041\[\x0a\"" [\]-]', 'start: "A[\\n\\"" /[\\U0000005D-\\U0000005D\\U0000002D-\\U0000002D]/'),
        ("root ::= [^a]", "start: /[^\\U00000061-\\U00000061]/"),
        ('root ::= a-b a_b A-b\na-b ::= ""\na_b ::= ""\nA-b ::= ""', 'start: r1 r2 r3\nr1: ""\nr2: ""\nr3: ""'),
    ],
)  # fmt: skip
def test_gbnf_becomes_lark(gbnf: str, lark: str) -> None:
    assert body(gbnf) == lark


BAD = [
    ("", "does not define the rule root"),
    ('foo ::= "yes"', "does not define the rule root"),
    ('root ::= "yes', "is not expected"),
    ("root ::= [abc", "is not expected"),
    ("root ::= bar", "does not define the rule bar"),
    ('root ::= "\\q"', "is not expected"),
    ('root ::= "\\ud800"', "is no character"),
    ("root ::= [z-a]", "runs backwards"),
    ('root ::= "a"{0,99999999999999999999999}', "2000 are the limit"),
    ('root ::= [^"]{0,5000}', "2000 are the limit"),
    ("root ::= " + "(" * (MAX_DEPTH + 1), "nested more than 64 deep"),
    ("root ::= " + "(" * 60_000, "nested more than 64 deep"),
    ('root ::= <think> "a"', "<think>"),
    ("root ::= r0\n" + "".join(f'r{i} ::= "a"\n' for i in range(MAX_RULES)), f"{MAX_RULES} are the limit"),
]


@pytest.mark.parametrize(("gbnf", "says"), BAD, ids=[says for _, says in BAD])
def test_a_bad_grammar_is_refused_with_its_reason(gbnf: str, says: str) -> None:
    with pytest.raises(BadGrammar, match=says) as refused:
        to_lark(gbnf)
    assert len(str(refused.value)) < 330
    assert "\n" not in str(refused.value)
