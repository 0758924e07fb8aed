"""Every finished answer fits its schema, few schemas are refused, and most answers finish."""

import collections
import datetime as dt
import json
import random
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
from schemas import REFUSED, SCHEMAS

from opsin import Message, Opsin
from opsin.core.errors import BadGrammar, ConstraintFailed

MOST_TOKENS = 400
FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("time", ValueError)
def _is_time(value: object) -> bool:
    return not isinstance(value, str) or dt.time.fromisoformat(value).tzinfo is not None


@FORMATS.checks("date-time", ValueError)
def _is_moment(value: object) -> bool:
    return not isinstance(value, str) or dt.datetime.fromisoformat(value).tzinfo is not None


def check(schema: Any, text: str) -> None:
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    kind(exact(json.dumps(schema)), format_checker=FORMATS).validate(exact(text))


def exact(text: str) -> Any:
    """JSON with fractions as they are written: by binary ones 1.11 is no multiple of 0.01."""
    return json.loads(text, parse_float=lambda number: Decimal(number) if Decimal(number) % 1 else int(Decimal(number)))


def ask_all(opsin: Opsin, names: list[str], seed: int) -> None:
    """Ask with each schema, as many at a time as the engine takes."""
    streams = {}
    for name in names:
        schema = json.dumps(SCHEMAS[name])
        question = [Message("user", f"Invent an example. Answer with JSON that fits this schema: {schema[:300]}")]
        streams[name] = opsin.submit(question, json_schema=schema, max_tokens=MOST_TOKENS, seed=seed, temperature=0.8)
    refused, wrong = set(), {}
    unfinished: collections.Counter[str] = collections.Counter()
    for name, stream in streams.items():
        try:
            answer = stream.result()
            if answer.finish_reason == "stop":
                check(SCHEMAS[name], answer.text)
            else:
                unfinished[name] += 1
        except BadGrammar:
            refused.add(name)
        except ConstraintFailed as error:
            unfinished[f"{name}: {error}"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            wrong[name] = f"{answer.text[:200]} ({str(error)[:100]})"
    print(f"{len(names)} schemas, {len(refused)} refused, unfinished: {list(unfinished)}")
    assert wrong == {}
    assert refused <= set(REFUSED)
    assert len(refused) <= 10
    assert unfinished.total() <= 0.2 * (len(names) - len(refused))


def some(count: int) -> list[str]:
    return random.Random(1).sample(sorted(set(SCHEMAS) - set(REFUSED)), count)


def test_there_are_many_schemas() -> None:
    assert len(SCHEMAS) >= 150
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_demo_model_keeps_to_all(demo: Opsin) -> None:
    ask_all(demo, list(SCHEMAS), 0)


@pytest.mark.timeout(600)
def test_a_real_model_keeps_to_some(smollm2: Opsin) -> None:
    ask_all(smollm2, some(12), 0)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_demo_model_keeps_to_all_with_other_seeds(demo: Opsin, seed: int) -> None:
    ask_all(demo, list(SCHEMAS), seed)


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(3))
def test_a_real_model_keeps_to_all(smollm2: Opsin, seed: int) -> None:
    ask_all(smollm2, list(SCHEMAS), seed)
