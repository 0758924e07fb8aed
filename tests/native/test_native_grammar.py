"""Grammars: what they accept comes out, what is hostile or wrong is refused in one sentence, and nothing dies."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from native_help import generate, prefill

from opsin.core.backend import TokenRow
from opsin.core.errors import BadGrammar, BadParameter
from opsin.core.parts import TextPart
from opsin.core.sampling import SamplingParams
from opsin.native.grammar import MAX_DEPTH, compile_grammar, compile_schema

HOT: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def answer(backend: Any, params: SamplingParams, seed: int, count: int = 200) -> tuple[str, bool]:
    """The text, and whether it ended by itself."""
    backend.kv_remove(0, 0, -1)
    layout = backend.layout([TextPart("USER: hello ASSISTANT:")], add_bos=True)
    sampler = backend.sampler(params, seed)
    try:
        tokens = generate(backend, sampler, prefill(backend, layout), count)
    finally:
        sampler.close()
    return b"".join(map(backend.piece, tokens)).decode("utf-8", "replace"), tokens[-1] in backend.eog_tokens


@pytest.mark.parametrize("seed", range(8))
def test_a_grammar_is_kept_to_and_ends_the_answer(backend: Any, seed: int) -> None:
    text, ended = answer(backend, SamplingParams(grammar='root ::= ("yes" | "no") ", " [a-c]{3}', **HOT), seed)
    assert re.fullmatch(r"(yes|no), [a-c]{3}", text), text
    assert ended


def test_greedy_with_a_grammar_is_the_best_allowed_token(backend: Any) -> None:
    """The first letter is the one with the highest logit among those that the grammar allows."""
    params = SamplingParams(temperature=0.0, grammar="root ::= [a-z]")
    text, _ = answer(backend, params, 1)
    backend.kv_remove(0, 0, -1)
    prefill(backend, backend.layout([TextPart("USER: hello ASSISTANT:")], add_bos=True))
    logits = backend._context.logits(-1)
    allowed = [t for t in range(512) if re.fullmatch(rb"[a-z]", backend.piece(t))]
    assert text.encode() == backend.piece(max(allowed, key=lambda token: logits[token]))


@pytest.mark.parametrize("seed", range(6))
def test_a_json_schema_gives_json_that_fits(backend: Any, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 20},
            "round": {"type": "boolean"},
        },
        "required": ["colour", "count", "round"],
        "additionalProperties": False,
    }
    text, ended = answer(backend, SamplingParams(json_schema=json.dumps(schema), **HOT), seed)
    assert ended, text
    value = json.loads(text)
    assert value["colour"] in {"red", "blue"}
    assert isinstance(value["count"], int)
    assert isinstance(value["round"], bool)


TANGLED = 'root ::= ([^一-龥é]{2} | "é漢" | "a"{1,3} "é"?) " "? ["\\] [0-9]+ ("yes" | "yellow" | .)'
LISTS = '{"type": "array", "items": {"enum": ["red", "rust", 17]}, "minItems": 3}'
STRINGS = '{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}'


@pytest.mark.parametrize("asked", [{"grammar": TANGLED}, {"json_schema": LISTS}, {"json_schema": STRINGS}])
@pytest.mark.parametrize("scale", [1.0, 0.2, 0.0], ids=["spread", "narrow", "equal"])
@pytest.mark.parametrize(
    "chain",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "logit_bias": {300: 3.0, 301: -float("inf")}},
        {"temperature": 2.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 1.0, "repeat_penalty": 1.5},
    ],
    ids=str,
)
def test_few_candidates_draw_what_all_would(
    backend: Any, asked: dict[str, str], scale: float, chain: dict[str, Any]
) -> None:
    """Against the same chain when it is handed the whole vocabulary, and a grammar that is asked about all of it."""
    assert backend.decode([TokenRow(9, 0, 0, True)])
    logits, model, rng = backend._context.logits(-1), backend._model, np.random.default_rng(7)
    params = SamplingParams(**{**asked, **chain})
    for seed in range(6):
        ours, whole = backend.sampler(params, seed), backend.sampler(params, seed)
        whole._keep, whole._greedy = 0, False
        for _ in range(30):
            # Coarse numbers: some are equal.
            logits[:] = np.round(rng.standard_normal(len(logits)) * scale, 2)
            pointer = ours._grammar.pointer
            every = model.candidates.permitted(pointer, np.arange(model.n_vocab))
            assert (model.prefix_tree.permitted(model.candidates, pointer) == every).all()
            token = ours.sample(-1)
            assert token == whole.sample(-1)
            assert every[token]
            if token in backend.eog_tokens:
                break
        ours.close()
        whole.close()


def test_penalties_remember_what_was_drawn_and_not_what_was_refused(backend: Any) -> None:
    assert backend.decode([TokenRow(9, 0, 0, True)])
    logits = backend._context.logits(-1)
    pieces = [backend.piece(token) for token in range(512)]
    a, b, c = (pieces.index(letter) for letter in (b"a", b"b", b"c"))
    logits[:] = 0.0
    logits[[a, b, c]] = 1.9, 2.0, 1.8
    params = SamplingParams(temperature=0.0, repeat_penalty=10.0, grammar='root ::= "a" [abc]{3}')
    sampler = backend.sampler(params, 1)
    assert [sampler.sample(-1) for _ in range(4)] == [a, b, c, b]
    sampler.close()


def test_the_end_is_not_taken_before_the_grammar_is_complete(backend: Any) -> None:
    """With the end token pushed above all others, the answer is still complete."""
    pushed = dict.fromkeys(backend.eog_tokens, 100.0)
    text, ended = answer(backend, SamplingParams(temperature=0.0, grammar='root ::= "abc"', logit_bias=pushed), 1)
    assert (text, ended) == ("abc", True)


def test_after_the_grammar_is_complete_only_the_end_may_follow(backend: Any) -> None:
    letter = backend._model.tokenize("b", special=False)[-1]
    params = SamplingParams(temperature=0.0, grammar='root ::= "a"', logit_bias={letter: 100.0})
    assert answer(backend, params, 1) == ("a", True)


def test_a_bias_that_leaves_nothing_raises_instead_of_aborting(backend: Any) -> None:
    every = {token: -float("inf") for token in range(512) if backend.piece(token)[:1] in {b"a", b" "}}
    with pytest.raises(BadGrammar, match="allows no token"):
        answer(backend, SamplingParams(temperature=0.0, grammar='root ::= "a"', logit_bias=every), 1)


def test_a_character_of_several_bytes_is_drawn_byte_by_byte(backend: Any) -> None:
    assert answer(backend, SamplingParams(grammar='root ::= "é漢"', **HOT), 3) == ("é漢", True)


def test_a_grammar_and_ignoring_the_end_contradict_each_other(backend: Any) -> None:
    with pytest.raises(BadParameter, match="ignore_eos cannot be used with a grammar"):
        backend.sampler(SamplingParams(grammar='root ::= "a"', ignore_eos=True), 1)


def test_one_seed_one_answer_under_a_grammar(backend: Any) -> None:
    params = SamplingParams(grammar="root ::= [a-z ]{12}", **HOT)
    assert answer(backend, params, 4) == answer(backend, params, 4)
    assert answer(backend, params, 4) != answer(backend, params, 5)


BAD: list[tuple[str, str]] = [
    ("", "empty"),
    ("   ", "empty"),
    ('foo ::= "yes"', "root"),
    ('root ::= root "a"', "left recursion"),
    ('root ::= "yes', "unexpected end"),
    ("root ::= bar", "Undefined rule identifier 'bar'"),
    ('root ::= "a"{0,99999999999999999999999}', "stoull"),
    ('root ::= "a"{5000}', "sane defaults"),
    ('root ::= [^"]{0,5000}', "up to 5000 times, and 2000 are the limit"),
    ("root ::= " + "(" * (MAX_DEPTH + 1), "nested 65 deep"),
    ("root ::= " + "(" * 60_000, "nested 60000 deep"),
    ('root ::= "a\0"', "NUL"),
    ('root ::= "' + "a" * 70_000 + '"', "characters"),
    ("root ::= [" + "ab" * 20_000 + "]{0,2000}", "grammar"),
    ('root ::= <think> "a"', "angle brackets"),
]


@pytest.mark.parametrize(("gbnf", "says"), BAD, ids=[says for _, says in BAD])
def test_a_bad_grammar_is_refused_with_its_reason(gbnf: str, says: str) -> None:
    with pytest.raises(BadGrammar, match=says) as refused:
        compile_grammar(gbnf)
    assert len(str(refused.value)) < 330
    assert "\n" not in str(refused.value)


def test_a_grammar_that_takes_exponential_time_is_refused() -> None:
    """llama.cpp looks for left recursion again and again behind each alternative: 2^60 visits here."""
    rules = "\n".join(f"r{n} ::= r{n + 1} | r{n + 1}" for n in range(60))
    with pytest.raises(BadGrammar, match=r"too much|did not compile"):
        compile_grammar(f'root ::= r0\n{rules}\nr60 ::= "a"')


BAD_SCHEMAS: list[tuple[str, str]] = [
    ("", "empty"),
    ('{"type": "obj', "not JSON"),
    ("[1, 2]", "must be a JSON object"),
    ('{"type": "nonsense"}', "Unrecognized schema"),
    ('{"$ref": "https://example.com/x.json"}', "nothing is fetched"),
    ('{"$ref": "#/definitions/x"}', "#/definitions/x"),
    ('{"type": "string", "pattern": "(?=a)"}', "Pattern"),
    ('{"type": "array", "items": {"type": "string"}, "minItems": 100000}', "sane defaults"),
    ('{"type": "string", "minLength": 5, "maxLength": 3}', "larger than its maximum"),
    ('{"a":' * 70 + "1" + "}" * 70, "nested 70 deep"),
]


@pytest.mark.parametrize(("schema", "says"), BAD_SCHEMAS, ids=[says for _, says in BAD_SCHEMAS])
def test_a_bad_schema_is_refused_with_its_reason(schema: str, says: str) -> None:
    with pytest.raises(BadGrammar, match=says) as refused:
        compile_schema(schema)
    assert len(str(refused.value)) < 330


def test_a_recursive_schema_compiles() -> None:
    schema = '{"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}}'
    assert "root ::=" in compile_schema(schema)


@pytest.mark.parametrize("seed", range(4))
def test_the_dot_of_a_pattern_stays_inside_its_string(backend: Any, seed: int) -> None:
    broken = {token: -float("inf") for token in range(512) if backend.piece(token)[:1] >= b"\x80"}
    params = SamplingParams(json_schema='{"type": "string", "pattern": "^.{8}$"}', logit_bias=broken, **HOT)
    text, ended = answer(backend, params, seed)
    assert ended
    assert len(json.loads(text)) == 8


def test_a_grammar_is_compiled_once_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    compile_grammar('root ::= "remembered"')
    monkeypatch.setattr(subprocess, "run", lambda *_: pytest.fail("compiled again"))
    compile_grammar('root ::= "remembered"')


@pytest.mark.parametrize("gbnf", ['root ::= "{0,5000}"', "root ::= [{0,5000}]", 'root ::= "a"{0,2000} # {0,5000}'])
def test_a_bound_in_quotes_is_no_bound(gbnf: str) -> None:
    assert compile_grammar(gbnf) == gbnf


def test_a_schema_whose_bound_would_not_be_kept_is_refused() -> None:
    assert "char{0,1500}" in compile_schema('{"type": "string", "maxLength": 1500}')
    with pytest.raises(BadGrammar, match="up to 9000 times"):
        compile_schema('{"type": "string", "maxLength": 9000}')


ARRAYS = [
    ({"minItems": 2, "maxItems": 3}, {2, 3}),
    ({"maxItems": 2}, {0, 1, 2}),
    ({"minItems": 1, "maxItems": 1}, {1}),
    ({"maxItems": 0}, {0}),
]


@pytest.mark.parametrize(("limits", "sizes"), ARRAYS, ids=str)
def test_arrays_keep_their_bounds(backend: Any, limits: Any, sizes: set[int]) -> None:
    schema = json.dumps({"type": "array", "items": {"enum": ["a", "b"]}, **limits})
    seen = set()
    for seed in range(12):
        text, ended = answer(backend, SamplingParams(json_schema=schema, **HOT), seed)
        assert ended
        seen.add(len(json.loads(text)))
    assert seen <= sizes
    assert len(seen) == min(len(sizes), 2) or seen == sizes


@pytest.mark.parametrize("seed", range(4))
def test_strings_keep_their_bounds(backend: Any, seed: int) -> None:
    schema = '{"type": "string", "minLength": 3, "maxLength": 6}'
    # Single bytes may form what the grammar takes for one character and Python for four broken ones.
    broken = {token: -float("inf") for token in range(512) if backend.piece(token)[:1] >= b"\x80"}
    text, ended = answer(backend, SamplingParams(json_schema=schema, logit_bias=broken, **HOT), seed)
    assert ended
    assert 3 <= len(json.loads(text)) <= 6


def test_a_bad_grammar_prints_nothing(in_child: Callable[[str], Any]) -> None:
    """llama.cpp prints it to standard error past every log callback."""
    child = in_child("""
from opsin.core.errors import BadGrammar
b = opened()
for params in (dict(grammar='root ::= "yes'), dict(json_schema='{"type": 3}')):
    try:
        b.sampler(SamplingParams(**params), 1)
    except BadGrammar as error:
        print("refused")
b.close()
""")
    assert (child.code, child.out, child.err) == (0, "refused\nrefused\n", "")


def test_a_refused_sampler_leaves_nothing_behind(backend: Any) -> None:
    before = len(backend._context.handle._children)
    for params in (SamplingParams(grammar="root ::= bar"), SamplingParams(logit_bias={9999: 1.0})):
        with pytest.raises((BadGrammar, BadParameter)):
            backend.sampler(params, 1)
    assert len(backend._context.handle._children) == before
    assert backend.decode([TokenRow(5, 0, 0, True)])
