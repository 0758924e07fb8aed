"""Every finished answer fits its schema, few schemas are refused, and most answers finish."""

import collections
import datetime
import json
import random
from typing import Any

import jsonschema
import pytest
from schemas import REFUSED, SCHEMAS

from opsin import Message, Opsin
from opsin.core.errors import BadGrammar

MOST_TOKENS = 400
FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("time", ValueError)
def _is_time(value: object) -> bool:
    return not isinstance(value, str) or datetime.time.fromisoformat(value).tzinfo is not None


@FORMATS.checks("date-time", ValueError)
def _is_moment(value: object) -> bool:
    return not isinstance(value, str) or datetime.datetime.fromisoformat(value).tzinfo is not None


def check(schema: Any, text: str) -> None:
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    kind(schema, format_checker=FORMATS).validate(json.loads(text))


def ask_all(opsin: Opsin, names: list[str], seeds: range, temperature: float = 0.8) -> None:
    """Ask with each schema and seed, as many at a time as the engine takes."""
    waiting = []
    for name in names:
        for seed in seeds:
            schema = json.dumps(SCHEMAS[name])
            question = [Message("user", f"Invent an example. Answer with JSON that fits this schema: {schema[:300]}")]
            params = {"json_schema": schema, "max_tokens": MOST_TOKENS, "seed": seed, "temperature": temperature}
            waiting.append((name, seed, opsin.submit(question, **params)))
    refused, ends, wrong = set(), collections.Counter(), {}
    for name, seed, stream in waiting:
        try:
            answer = stream.result()
        except BadGrammar:
            refused.add(name)
            continue
        ends[answer.finish_reason] += 1
        if answer.finish_reason == "stop":
            try:
                check(SCHEMAS[name], answer.text)
            except (ValueError, jsonschema.ValidationError) as error:
                wrong[name, seed] = f"{answer.text[:200]} ({str(error)[:100]})"
    print(f"{len(names)} schemas, {len(refused)} refused, ends: {dict(ends)}")
    assert wrong == {}
    assert refused <= set(REFUSED)
    assert len(refused) <= 10
    assert ends["stop"] >= 0.8 * ends.total()


def some(count: int) -> list[str]:
    return random.Random(1).sample(sorted(set(SCHEMAS) - set(REFUSED)), count)


def test_there_are_many_schemas() -> None:
    assert len(SCHEMAS) >= 150
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_demo_model_keeps_to_all(demo: Opsin) -> None:
    ask_all(demo, list(SCHEMAS), range(1))


@pytest.mark.slow
def test_the_demo_model_keeps_to_all_with_other_seeds(demo: Opsin) -> None:
    ask_all(demo, list(SCHEMAS), range(1, 3))


def test_a_real_model_keeps_to_some(smollm2: Opsin) -> None:
    ask_all(smollm2, some(24), range(1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(3))
def test_a_real_model_keeps_to_all(smollm2: Opsin, seed: int) -> None:
    ask_all(smollm2, list(SCHEMAS), range(seed, seed + 1))
