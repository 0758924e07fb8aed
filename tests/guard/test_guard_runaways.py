"""The guard stops what will not end: 95 of 100 within 200 tokens of the first thing said twice."""

from __future__ import annotations

import pytest
from runaways import KINDS, TEST_SEEDS, Runaway

from opsin.engine.guard import Guard


def stopped_at(tokens):
    guard = Guard()
    for token, text in tokens:
        verdict = guard.feed(token, text)
        if verdict is not None:
            return verdict
    return None


def delay(runaway: Runaway) -> float:
    verdict = stopped_at(runaway.tokens)
    return float("inf") if verdict is None else verdict.at_token - runaway.first_repeat


@pytest.mark.parametrize("kind", KINDS)
def test_nearly_all_are_stopped_within_200_tokens(kind):
    delays = sorted(delay(KINDS[kind](seed)) for seed in TEST_SEEDS)
    in_time = sum(late <= 200 for late in delays)
    print(f"{kind}: {in_time} of {len(delays)} in time, median {delays[len(delays) // 2]:.0f} tokens")
    assert in_time >= 0.95 * len(delays)
    assert delays[0] > 20, "stopped before there was anything to see"


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_stopped_in_the_end(kind):
    assert all(delay(KINDS[kind](seed)) < 500 for seed in TEST_SEEDS)


def test_a_list_without_repeats_is_left_alone():
    for seed in TEST_SEEDS:
        runaway = KINDS["synonym drift"](seed)
        assert stopped_at(runaway.tokens[: runaway.first_repeat]) is None


def test_generators_say_nothing_twice_before_their_mark_and_are_seeded():
    for kind, make in KINDS.items():
        assert make(3) == make(3) != make(4), kind
    runaway = KINDS["synonym drift"](1)
    before = "".join(text for _, text in runaway.tokens[: runaway.first_repeat])
    items = [item.strip(" -*\n") for item in before.replace("\n", ",").replace(";", ",").split(",")]
    named = [item for item in items[1:] if item]
    assert len(named) >= 25
    assert len(set(named)) == len(named)
