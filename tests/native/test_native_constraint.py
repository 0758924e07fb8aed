"""Schemas and grammars: what they accept comes out, what is hostile or wrong ends in one sentence, and nothing dies."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from native_help import generate, held, prefill
from token_rows import TokenRow, batch

from opsin.core.errors import BadGrammar, BadParameter, ConstraintFailed
from opsin.core.request import SamplingParams, TextPart
from opsin.native import constraint

HOT: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def answer(backend: Any, params: SamplingParams, seed: int, count: int = 200) -> tuple[str, bool]:
    """The text, and whether it ended by itself."""
    backend.kv_remove(0, 0, -1)
    tokenized = backend.tokenize([TextPart("USER: hello ASSISTANT:")], add_bos=True)
    sampler = held(backend, params, seed)
    try:
        tokens = generate(backend, sampler, prefill(backend, tokenized), count)
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
    prefill(backend, backend.tokenize([TextPart("USER: hello ASSISTANT:")], add_bos=True))
    logits = backend.logits(-1)
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


@pytest.mark.parametrize(
    "asked", [{"grammar": "root ::= [a-z] [a-z ]{5} [é漢a]"}, {"json_schema": '{"type": "string"}'}]
)
@pytest.mark.parametrize(
    "chain",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logit_bias": {300: 3.0, 301: -float("inf")}},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 1.0, "repeat_penalty": 1.5},
        HOT,
    ],
    ids=str,
)
def test_what_is_sampled_is_permitted_and_what_the_chain_samples_from_permitted_tokens(
    backend: Any, asked: dict[str, str], chain: dict[str, Any]
) -> None:
    """Against a plain sampler over logits that were masked by asking about every single token.

    A chain that samples at random is asked without the mask first, so it may choose another permitted token.
    """
    assert backend.decode(batch([TokenRow(9, 0, 0, True)]))
    logits, n_vocab, rng = backend.logits(-1), backend.limits.n_vocab, np.random.default_rng(7)
    params = SamplingParams(**{**asked, **chain})
    same = params.temperature == 0 or params.repeat_penalty != 1.0 or params.top_k == 1
    for seed in range(4):
        ours, plain = held(backend, params, seed), backend.sampler(SamplingParams(**chain), seed)
        for _ in range(12):
            scores = rng.standard_normal(n_vocab).astype(np.float32)
            permitted = ours._constraint.mask(np.array([], np.intp)).copy()
            assert all(
                ours._constraint.permits(one) for one in np.flatnonzero(permitted) if one not in backend.eog_tokens
            )
            logits[:] = np.where(permitted, scores, -np.inf)
            expected = plain.sample(-1)
            logits[:] = scores
            before = ours._constraint._matcher.deep_copy()
            token = ours.sample(-1)
            assert permitted[token] or before.validate_tokens([token]) == 1
            assert token == expected or not same
            if token in backend.eog_tokens or token != expected:
                break
        ours.close()
        plain.close()


def test_without_cuts_draws_follow_the_permitted_distribution(backend: Any) -> None:
    """Asked first and masked when refused is the masked distribution: 2,000 draws, within five standard deviations."""
    assert backend.decode(batch([TokenRow(9, 0, 0, True)]))
    logits = backend.logits(-1)
    letters = [token for token in range(512) if backend.piece(token) in {b"a", b"b", b"c"}]
    scores = np.full(512, 1.0, np.float32)
    scores[letters] = np.arange(len(letters)) + 1.0
    chances = np.exp(scores[letters]) / np.exp(scores[letters]).sum()
    found = []
    for seed in range(2000):
        logits[:] = scores
        sampler = held(backend, SamplingParams(grammar="root ::= [abc]", **{**HOT, "temperature": 1.0}), seed)
        found.append(sampler.sample(-1))
        sampler.close()
    for token, chance in zip(letters, chances, strict=True):
        assert abs(found.count(token) - 2000 * chance) < 5 * np.sqrt(2000 * chance * (1 - chance)) + 1


def test_log_probabilities_are_the_models_own_also_under_a_constraint(backend: Any) -> None:
    assert backend.decode(batch([TokenRow(9, 0, 0, True)]))
    expected = {token: backend.logprobs(0, token, 5) for token in range(512)}
    sampler = held(backend, SamplingParams(grammar='root ::= "abc"', logprobs=5), 1)
    ((token, logprob),) = backend.sample([(sampler, 0, 5)])
    assert backend.piece(token)[:1] == b"a"
    assert logprob == expected[token]
    sampler.close()


def test_penalties_remember_what_was_drawn_and_not_what_was_refused(backend: Any) -> None:
    assert backend.decode(batch([TokenRow(9, 0, 0, True)]))
    logits = backend.logits(-1)
    pieces = [backend.piece(token) for token in range(512)]
    a, b, c = (pieces.index(letter) for letter in (b"a", b"b", b"c"))
    params = SamplingParams(temperature=0.0, repeat_penalty=10.0, grammar='root ::= "a" [abc]{3}')
    sampler, drawn = held(backend, params, 1), []
    for _ in range(4):
        logits[:] = 0.0
        logits[[a, b, c]] = 1.9, 2.0, 1.8
        drawn.append(sampler.sample(-1))
    assert drawn == [a, b, c, b]
    sampler.close()


def test_the_end_is_not_taken_before_the_grammar_is_complete(backend: Any) -> None:
    """With the end token pushed above all others, the answer is still complete."""
    pushed = dict.fromkeys(backend.eog_tokens, 100.0)
    text, ended = answer(backend, SamplingParams(temperature=0.0, grammar='root ::= "abc"', logit_bias=pushed), 1)
    assert (text, ended) == ("abc", True)


def test_after_the_grammar_is_complete_only_the_end_may_follow(backend: Any) -> None:
    letter = backend.model.tokenize("b", special=False)[-1]
    params = SamplingParams(temperature=0.0, grammar='root ::= "a"', logit_bias={letter: 100.0})
    assert answer(backend, params, 1) == ("a", True)


def test_a_bias_that_leaves_nothing_raises_instead_of_aborting(backend: Any) -> None:
    every = {token: -float("inf") for token in range(512) if backend.piece(token)[:1] in {b"a", b" "}}
    with pytest.raises(ConstraintFailed, match="No token of this model fits"):
        answer(backend, SamplingParams(temperature=0.0, grammar='root ::= "a"', logit_bias=every), 1)


def test_a_character_of_several_bytes_is_drawn_byte_by_byte(backend: Any) -> None:
    assert answer(backend, SamplingParams(grammar='root ::= "é漢"', **HOT), 3) == ("é漢", True)


def test_a_grammar_and_ignoring_the_end_contradict_each_other(backend: Any) -> None:
    with pytest.raises(BadParameter, match="ignore_eos cannot be used with a grammar"):
        held(backend, SamplingParams(grammar='root ::= "a"', ignore_eos=True), 1)


def test_one_seed_one_answer_under_a_grammar(backend: Any) -> None:
    params = SamplingParams(grammar="root ::= [a-z ]{12}", **HOT)
    assert answer(backend, params, 4) == answer(backend, params, 4)
    assert answer(backend, params, 4) != answer(backend, params, 5)


BAD_SCHEMAS: list[tuple[str, str]] = [
    ("", "not JSON"),
    ('{"type": "obj', "not JSON"),
    ("[1, 2]", "must be a JSON object"),
    ("false", "must be a JSON object"),
    ('{"type": "nonsense"}', "Invalid type: nonsense"),
    ('{"$ref": "https://example.com/x.json"}', "does not fetch"),
    ('{"$ref": "#/definitions/x"}', "/definitions/x"),
    ('{"$ref": "#"}', "no answer fits it"),
    ('{"type": "string", "pattern": "(?=a)"}', "look-around"),
    ('{"type": "string", "pattern": "("}', "unclosed group"),
    ('{"type": "string", "minLength": 5, "maxLength": 3}', "minLength .5. is greater"),
    ('{"type": "integer", "minimum": 5, "maximum": 3}', "[Uu]nsatisfiable|minimum"),
    ('{"items":' * 70 + "{}" + "}" * 70, "nested more than 64 deep"),
    ('{"items":' * 5000 + "{}" + "}" * 5000, "not JSON|deep"),
    ('{"not": {"type": "string"}}', "not"),
    ('{"format": "regex"}', "Unknown format: regex"),
]


@pytest.mark.parametrize(("schema", "says"), BAD_SCHEMAS, ids=[says for _, says in BAD_SCHEMAS])
def test_a_bad_schema_is_refused_with_its_reason(backend: Any, schema: str, says: str) -> None:
    for _ in range(2):  # a refusal is remembered as well
        with pytest.raises(BadGrammar, match=says) as refused:
            backend.check(SamplingParams(json_schema=schema))
        assert len(str(refused.value)) < 330
        assert "\n" not in str(refused.value)


def test_a_bad_grammar_is_refused_before_anything_is_computed(backend: Any) -> None:
    for gbnf, says in (
        ("root ::= bar", "does not define"),
        ('root ::= root "a"', "no answer fits"),
        ("root ::= [^\\x00-\\U0010FFFF]", "no answer fits"),
        ('root ::= ("a"', r"Expected token '\)'"),
        ('root ::= "a")', "expecting rule, token"),
        ('root ::= "a"**', "Expected value"),
        ('root ::= *"a"', "Expected value"),
        ('"a" root ::= "b"', "expecting rule"),
        ('root ::= "a"\nroot ::= "b"', "duplicate rule"),
    ):
        with pytest.raises(BadGrammar, match=f"^The grammar cannot be used: .*{says}") as refused:
            backend.check(SamplingParams(grammar=gbnf))
        assert "\n" not in str(refused.value)


def test_a_list_of_thousands_of_words_is_a_grammar(backend: Any) -> None:
    words = [f"w{number:04}" for number in range(4500)]
    gbnf = "root ::= (" + " | ".join(f'"{word}"' for word in words) + ') "."'
    text, ended = answer(backend, SamplingParams(grammar=gbnf, **HOT), 1)
    assert ended
    assert text.removesuffix(".") in words


def test_a_left_recursive_grammar_is_no_fault(backend: Any) -> None:
    text, ended = answer(backend, SamplingParams(grammar='root ::= root "a" | "b"', logit_bias={}, **HOT), 1, 400)
    assert re.fullmatch("ba*", text)
    assert ended or len(text) > 100


@pytest.mark.parametrize("seed", range(4))
def test_the_dot_of_a_pattern_stays_inside_its_string(backend: Any, seed: int) -> None:
    broken = {token: -float("inf") for token in range(512) if backend.piece(token)[:1] >= b"\x80"}
    params = SamplingParams(json_schema='{"type": "string", "pattern": "^.{8}$"}', logit_bias=broken, **HOT)
    text, ended = answer(backend, params, seed)
    assert ended
    assert len(json.loads(text)) == 8


def test_a_schema_is_compiled_once_for_all_who_ask_at_the_same_time(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(constraint, "to_lark", lambda text: compiled.append(text) or 'start: "a"')
    params = SamplingParams(grammar='root ::= "remembered"')
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: backend.check(params), range(8)))
    assert answer(backend, params, 1) == ("a", True)
    assert len(compiled) == 1


def test_the_oldest_are_forgotten_and_compiled_again_when_asked_for(backend: Any) -> None:
    for number in range(constraint.REMEMBERED + 3):
        backend.check(SamplingParams(grammar=f'root ::= "{number}"'))
    assert backend._constraints._compiled.cache_info().currsize == constraint.REMEMBERED
    assert answer(backend, SamplingParams(grammar='root ::= "0"'), 1) == ("0", True)


def test_what_a_request_waits_with_is_never_compiled_where_its_answer_starts(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is the engine's thread; more may wait than are remembered."""
    params = SamplingParams(grammar='root ::= "waits"')
    compiled = backend.check(params)
    for number in range(constraint.REMEMBERED + 3):
        backend.check(SamplingParams(grammar=f'root ::= "{number} others"'))
    monkeypatch.setattr(constraint, "to_lark", lambda _: pytest.fail("compiled again"))
    tokenized = backend.tokenize([TextPart("USER: hello ASSISTANT:")], add_bos=True)
    sampler = backend.sampler(params, 5, compiled)
    tokens = generate(backend, sampler, prefill(backend, tokenized), 20)
    sampler.close()
    assert b"".join(map(backend.piece, tokens)) == b"waits"


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


def test_nothing_is_printed(in_child: Callable[[str], Any]) -> None:
    """llguidance warns on standard error unless it is told not to."""
    child = in_child("""
from opsin.core.errors import BadGrammar
b = opened()
for params in (dict(grammar='root ::= "yes'), dict(json_schema='{"type": 3}'), dict(json_schema='{"oneOf": [{}, {}]}')):
    try:
        b.check(SamplingParams(**params))
        print("taken")
    except BadGrammar as error:
        print("refused")
b.close()
""")
    assert (child.code, child.out, child.err) == (0, "refused\nrefused\ntaken\n", "")


def test_a_refused_sampler_leaves_nothing_behind(backend: Any) -> None:
    before = len(backend.handle._children)
    for params in (SamplingParams(grammar="root ::= bar"), SamplingParams(logit_bias={9999: 1.0})):
        with pytest.raises((BadGrammar, BadParameter)):
            held(backend, params, 1)
    assert len(backend.handle._children) == before
    assert backend.decode(batch([TokenRow(5, 0, 0, True)]))
