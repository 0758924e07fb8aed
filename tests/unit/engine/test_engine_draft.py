"""Drafts change when tokens are computed, never which."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from engine_driver import Asked, Backend, Driver, limits, prompt_of

from opsin.core.answer import Finished, ReasoningStyle
from opsin.core.errors import OpsinError
from opsin.core.request import EmbeddingRows, ImageChunk, Prompt, SamplingParams, TextChunk, TextPart, TokenBatch
from opsin.engine import Engine, Policy
from opsin.engine.draft import Drafter, Lookup
from opsin.engine.speculation import Speculation
from opsin.engine.step import Tokens
from opsin.testing import FakeBackend, FakeClock
from opsin.testing.fake_backend import TURN_TEXT

ROWS = '[{"name": "ann", "age": 1}, {"name": "bob", "age": 2}, {"name": "eve", "age": 3}]'
LOOP = "to be or not " * 12


class Priced(Backend):
    """A step takes 8 ms, and `row_ms` more for each row behind the first."""

    row_ms = 1.0

    def decode(self, rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
        if isinstance(rows, TokenBatch):
            self.clock.spend(self.row_ms * (len(rows.tokens) - 1))
        return super().decode(rows, may_stop=may_stop)


def driver(text: str, beside: int = 4, *, row_ms: float = 1.0, **changed: Any) -> Driver:
    size = dataclasses.replace(limits(n_ctx=2048, n_ubatch=64), **changed)
    backend = Priced(lambda _: text, limits=size, clock=FakeClock())
    backend.row_ms = row_ms
    return Driver(size, Policy(parallel=6, draft_beside=beside), backend)


def drafted(made: Driver) -> list[Tokens]:
    return [plan.step for plan in made.plans if isinstance(plan.step, Tokens) and plan.step.drafts]


def decode_steps(made: Driver) -> int:
    return sum(isinstance(plan.step, Tokens) and bool(plan.step.decode) for plan in made.plans)


def told(asked: Asked) -> object:
    answer = asked.answer
    return answer.text, answer.tokens, answer.finish_reason, answer.limit, answer.logprobs, answer.usage, asked.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max_tokens": 50},
        {"max_tokens": 51},
        {"max_tokens": 500, "ignore_eos": True},
        {"stop": ("be or", "nobody")},
        {"stop": ('"age": 3',)},
        {"logprobs": 2},
        {"min_tokens": 300, "max_tokens": 400},
    ],
)
@pytest.mark.parametrize("text", [ROWS, LOOP])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_answers_are_the_same_in_fewer_steps(text: str, params: dict[str, Any], asynchronous: bool) -> None:
    answers, steps = [], []
    for beside in (0, 4):
        made = driver(text, beside, asynchronous=asynchronous)
        # One at a time, then three at once: the later ones have earlier answers to go by.
        for count in (1, 1, 3):
            for _ in range(count):
                made.ask(prompt_of("hello", 1), **{"max_tokens": 300, **params})
            made.run()
        answers.append([told(asked) for asked in made.asked])
        steps.append(decode_steps(made))
        counted = made.loop.snapshot()
        timings = [asked.answer.timings for asked in made.asked]
        assert counted.draft_tokens == sum(one.draft_n for one in timings) == sum(s.drafted for s in drafted(made))
        assert counted.draft_accepted == sum(one.draft_n_accepted for one in timings) <= counted.draft_tokens
        assert counted.generated_tokens >= counted.decode_tokens
        assert (counted.draft_accepted > 0) == (beside > 0)
        made.close()
    assert answers[0] == answers[1]
    assert steps[1] < 0.8 * steps[0]


def test_the_guard_ends_an_answer_at_the_same_token(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    monkeypatch.setattr("opsin.engine.speculation.FASTEST", 0.0)  # a fake takes no real time
    for beside in (0, 4):
        policy = Policy(parallel=1, draft_beside=beside)
        with Engine(lambda: FakeBackend(lambda _: "so " * 2000, limits=limits(n_ctx=4096)), policy=policy) as engine:
            answer = engine.submit(Prompt((TextPart(TURN_TEXT),)), SamplingParams(max_tokens=3000)).result()
            ends.append((answer.guard, answer.limit, answer.tokens))
            assert (answer.timings.draft_n > 0) == (beside > 0)
    assert ends[0] == ends[1]
    assert ends[0][0] is not None


@pytest.mark.parametrize("budget", [None, 30])
def test_reasoning_ends_at_the_same_token_and_its_budget_holds(
    budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opsin.engine.speculation.FASTEST", 0.0)
    text = "<think>" + LOOP + "</think>" + ROWS
    answers = []
    for beside in (0, 4):
        policy = Policy(parallel=1, draft_beside=beside)
        with Engine(lambda: FakeBackend(lambda _: text, limits=limits(n_ctx=1024)), policy=policy) as engine:
            prompt = Prompt((TextPart(TURN_TEXT),), reasoning=ReasoningStyle())
            params = SamplingParams(max_tokens=400, max_thinking_tokens=budget, guard=False)
            answer = engine.submit(prompt, params).result()
            answers.append((answer.reasoning, answer.text, answer.tokens))
            assert (answer.timings.draft_n_accepted > 0) == (beside > 0)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("schema", [None, "{}"])
def test_reasoning_before_a_schema_gets_no_drafts(schema: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it ends another sampler begins, in the middle of what was decoded with the draft."""
    monkeypatch.setattr("opsin.engine.speculation.FASTEST", 0.0)
    draft, seen = Speculation._draft, set[tuple[bool, bool]]()

    def drafted_for(self: Speculation, sequence: Any, *more: Any) -> tuple[int, ...]:
        found = draft(self, sequence, *more)
        seen.add((sequence.output.thinking, bool(found)))
        return found

    monkeypatch.setattr(Speculation, "_draft", drafted_for)
    text = "<think>" + LOOP + "</think>" + ROWS
    with Engine(
        lambda: FakeBackend(lambda _: text, limits=limits(n_ctx=1024)), policy=Policy(draft_beside=4)
    ) as engine:
        prompt = Prompt((TextPart(TURN_TEXT),), reasoning=ReasoningStyle())
        engine.submit(prompt, SamplingParams(max_tokens=400, guard=False, json_schema=schema)).result()
    assert ((True, True) in seen) == (schema is None)
    assert (False, True) in seen


def test_a_full_context_ends_an_answer_at_the_same_token() -> None:
    answers = []
    for beside in (0, 4):
        made = driver(LOOP, beside, n_ctx=60, n_ctx_seq=60)
        asked = made.ask(prompt_of("hi"), max_tokens=100)
        made.run()
        answers.append(told(asked))
        assert asked.answer.limit == "context"
        made.close()
    assert answers[0] == answers[1]


def test_drafts_take_no_cell_from_anybody() -> None:
    """Three answers fill the cache: whoever is put back into the queue is so without drafts, too."""
    preemptions = []
    for beside in (0, 4):
        made = driver(LOOP, beside, n_ctx=128, n_ctx_seq=128)
        for _ in range(3):
            made.ask(prompt_of("hi"), max_tokens=60)
        made.run()
        assert all(asked.text == LOOP[:60] for asked in made.asked)
        preemptions.append(made.scheduler.preemptions)
        made.close()
    assert preemptions[1] <= preemptions[0]


def test_what_a_draft_leaves_behind_is_forgotten_before_anybody_forks_it() -> None:
    made = driver(ROWS)
    made.ask(prompt_of("hello"), max_tokens=200)
    made.run()
    made.ask(prompt_of("hello", ROWS + " more"), max_tokens=200)
    made.run()
    assert made.asked[1].answer.usage.cached_tokens > 0
    made.close()  # which compares the counts with the backend's cells


def test_who_goes_away_in_the_middle_leaves_nothing() -> None:
    made = driver(LOOP)
    asked = made.ask(prompt_of("hello"), max_tokens=200)
    while not drafted(made):
        made.step()
    asked.stream.cancel()
    made.step()
    made.step()
    made.close()


def test_many_answers_at_once_get_no_drafts() -> None:
    made = driver(LOOP)
    for _ in range(5):
        made.ask(prompt_of("hello"), max_tokens=100)
    made.run()
    assert all(len(step.decode) <= 4 for step in drafted(made))
    made.close()


def test_a_model_with_one_state_for_all_tokens_gets_no_drafts() -> None:
    made = driver(LOOP, forks=False)
    made.ask(prompt_of("hello"), max_tokens=100)
    made.run()
    assert not drafted(made)
    made.close()


@pytest.mark.slow
def test_rows_that_cost_more_than_steps_are_hardly_drafted() -> None:
    made = driver(LOOP, row_ms=12.0)
    for _ in range(12):
        made.ask(prompt_of("hello"), max_tokens=150)
        made.run()
    assert drafted(made)  # it has to be tried, and now and then again
    last = [asked.answer for asked in made.asked[6:]]
    assert sum(answer.timings.draft_n for answer in last) <= 30
    assert sum(answer.stages.decode_ms for answer in last) < 1.03 * 6 * 8 * 150
    made.close()


@pytest.mark.slow
def test_guesses_that_are_wrong_are_not_drafted_for_long() -> None:
    """Every three letters came before, and never went on so."""
    letters = [f"abc{chr(first)}{chr(second)}" for first, second in itertools.product(range(65, 91), range(65, 91))]
    made = driver("".join(letters)[:1500], row_ms=2.0)
    made.ask(prompt_of("hello"), max_tokens=1500)
    made.run()
    assert made.asked[0].answer.text == "".join(letters)[:1500]
    took = made.asked[0].answer.stages.decode_ms
    assert took < 1.05 * 8 * 1500


def test_a_model_that_takes_no_time_gets_no_drafts() -> None:
    made = driver(LOOP)
    made.backend.decode_ms = 0.5
    for _ in range(2):
        made.ask(prompt_of("hello"), max_tokens=100)
        made.run()
    assert not drafted(made)
    made.close()


def test_answers_of_one_key_are_no_drafts_for_another() -> None:
    made = driver("qwertyuiopasdfghjklzxcvbnm1234567890")
    for salt in ("one", "one", "two"):
        made.ask(prompt_of("hello"), max_tokens=100, salt=salt)
        made.run()
    first, second, other = (asked.answer.timings.draft_n_accepted for asked in made.asked)
    assert (first, other) == (0, 0)
    assert second > 0
    made.close()


def test_a_draft_that_cannot_be_forgotten_ends_its_own_answer() -> None:
    made = driver(LOOP)
    asked = made.ask(prompt_of("hello"), max_tokens=200)
    remove = made.backend.kv_remove
    made.backend.kv_remove = lambda seq_id, start, end: start == 0 and remove(seq_id, start, end)  # type: ignore[method-assign]
    while not asked.stream.done:
        made.step()
    (end,) = asked.ends
    assert isinstance(end, OpsinError)
    assert not isinstance(end, Finished)


def test_a_lookup_goes_on_as_the_tokens_did_the_last_time() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 5, 1, 2, 3, 9, 8, 7])
    assert lookup.after((1, 2, 3), 2) == (9, 8)
    assert lookup.after((2, 3, 4), 3) == (5, 1, 2)
    assert lookup.after((3, 2, 1), 3) == ()
    lookup.extend([1, 2, 3])
    assert lookup.after((1, 2, 3), 8) == (9, 8, 7, 1, 2, 3, 9, 8)


def test_a_draft_ends_where_an_image_or_another_answer_begins() -> None:
    earlier = Lookup()
    prompt = [TextChunk((1, 2, 3, 4)), ImageChunk("a:0", 0, 4, 4), TextChunk((5, 6, 7))]
    drafter = Drafter(prompt, earlier, 0.5)
    assert drafter.guess([1, 2, 3], 5) == (4,)
    drafter.end([1, 2, 3, 11], 0)
    assert Drafter(prompt, earlier, 0.5).guess([], 9) == (1, 2, 3, 11, 0)


def test_odds_follow_what_the_guesses_were_worth() -> None:
    drafter = Drafter([TextChunk((1, 2, 3, 4, 5, 6))], Lookup(), 0.5)
    assert drafter.guess([1, 2, 3], 1) == (4,)
    assert drafter.guess([1, 2, 3, 4], 2) == (5, 6)
    better = drafter.odds
    assert better > 0.5
    drafter.guess([1, 2, 3, 4, 9], 2)
    assert drafter.odds < better
