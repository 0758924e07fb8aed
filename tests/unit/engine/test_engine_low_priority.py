"""Batch work beside live requests: it fills what is left and gives way at once."""

from dataclasses import replace
from threading import Timer

import pytest
from engine_driver import Backend, Driver, limits, prompt_of

from opsin.core.backend import BackendLimits
from opsin.engine import Policy
from opsin.engine.request import State
from opsin.engine.step import Encode, PrefillImage, Tokens, members_of
from opsin.testing import FakeClock, image


def long(text: str) -> str:
    return (text[-2:] + ".") * 200


def driver(parallel: int = 4, size: BackendLimits | None = None, **policy: object) -> Driver:
    size = size or limits(n_ctx=2000)
    made = Driver(size, Policy(parallel=parallel, **policy), Backend(long, limits=size, clock=FakeClock()))  # type: ignore[arg-type]
    made.backend.preprocess_ms = 0.0
    made.backend.image_tokens = 64
    return made


def test_a_live_request_gets_a_slot_at_once_and_who_gave_way_answers_the_same() -> None:
    made = driver(parallel=2)
    low = [made.ask(f"batch {i}", priority=-1) for i in range(4)]
    for _ in range(5):
        made.step()
    live = made.ask("live")
    made.step()
    assert live.started_at == made.steps
    made.run()
    assert made.scheduler.preemptions == 1
    alone = driver(parallel=6)
    texts = [alone.ask(text) for text in (*(f"batch {i}" for i in range(4)), "live")]
    alone.run()
    assert [one.answer.text for one in (*low, live)] == [one.answer.text for one in texts]


def test_nothing_of_low_priority_is_computed_before_the_first_token_of_a_live_request() -> None:
    made = driver()
    for i in range(3):
        made.ask(prompt_of(i), priority=-1, max_tokens=100)
    for _ in range(12):
        made.step()
    live = made.ask(prompt_of(9))
    begin = len(made.plans)
    while live.first_token_at is None:
        made.step()
    members = {id(one) for plan in made.plans[begin:] if plan.step is not None for one in members_of(plan.step)}
    assert members == {id(live.sequence)}
    assert made.turns == []


def test_an_encode_of_low_priority_ends_early_for_a_live_request_and_is_done_again() -> None:
    made = driver()
    made.backend.layers = 10
    low = made.ask(prompt_of(1), priority=-1)
    seen: list[float] = []

    spend = made.backend.clock.spend

    def spending(ms: float) -> None:
        spend(ms)
        seen.append(ms)
        if len(seen) == 3:  # in the midst of the encode
            made.ask(prompt_of(2))

    made.backend.clock.spend = spending  # type: ignore[method-assign]
    while not isinstance(made.plans[-1].step if made.plans else None, Encode):
        made.step()
    assert made.backend.encoded == [], "it was not finished"
    assert low.sequence.embedding is None
    made.run()
    order = [name.partition(":")[0] for name in made.backend.encoded]
    live = made.asked[1]
    assert order == [image(2).sha256, image(1).sha256]
    assert live.first_token_at is not None
    assert low.first_token_at is not None
    assert live.first_token_at < low.first_token_at


def test_streams_get_their_tokens_beside_batch_images_as_beside_any() -> None:
    made = driver(shortest_wait=0.03, stream_share=1.0)
    made.backend.layers = 10
    stream = made.ask("talk", max_tokens=200)
    made.step()
    made.ask(prompt_of(1), priority=-1)
    made.ask(prompt_of(2), priority=-1)
    made.run()
    assert made.turns
    assert all(made.asked[0].sequence in step.decode for step in made.turns)
    assert stream.answer.finish_reason == "length"


@pytest.mark.parametrize("live", [False, True])
def test_alone_batch_work_is_not_cut_into_slices_and_its_tokens_wait(live: bool) -> None:
    made = driver(size=limits(n_ctx=2000, n_ubatch=64), slice=16)
    if live:
        made.ask("hello", max_tokens=1)
        made.run()
    for i in range(3):
        made.ask(prompt_of(i), priority=-1)
    begin = len(made.plans)
    made.run()
    steps = [plan.step for plan in made.plans[begin:]]
    rows = [step.rows for step in steps if isinstance(step, PrefillImage)]
    assert (max(rows) >= 64) is not live
    filling = [plan for plan in steps if isinstance(plan, Tokens) and plan.decode and not plan.prefill]
    assert filling, "they decode together"
    assert all(len(plan.decode) == 3 for plan in filling[:5])


def test_low_priority_ends_with_its_reader() -> None:
    made = driver(parallel=1)
    low = made.ask("batch", priority=-1, max_tokens=100)
    made.step()
    live = made.ask("live", max_tokens=100)
    made.step()
    assert low.sequence.state is State.WAITING
    low.stream.cancel()
    made.step()
    live.stream.cancel()
    made.run()
    assert made.scheduler.idle


def test_batch_work_holds_few_cells_unless_it_shares_them() -> None:
    made = driver(parallel=6, low_cells=160)
    for i in range(4):
        made.ask(prompt_of(i), priority=-1)
    made.run()
    assert max(len(plan.step.decode) for plan in made.plans if isinstance(plan.step, Tokens)) == 2
    same = driver(parallel=6, low_cells=160)
    for i in range(4):
        same.ask(prompt_of(1, f"{i}"), priority=-1, max_tokens=40)
    same.run()
    assert max(len(plan.step.decode) for plan in same.plans if isinstance(plan.step, Tokens)) == 4


def test_the_decode_of_a_batch_row_ends_at_once_for_a_live_request_and_is_done_again() -> None:
    made = driver(size=replace(limits(n_ctx=2000, n_ubatch=64), stops=True))
    low = made.ask(prompt_of(1), priority=-1)

    def arriving() -> None:
        if low.sequence.embedding is not None and len(made.asked) == 1:
            made.ask("live")

    made.backend.on_decode = arriving
    while len(made.asked) == 1:
        made.step()
    assert low.sequence.n_cells == 1, "the step was lost"
    live = made.asked[1]
    made.run()
    assert live.first_token_at is not None
    assert low.first_token_at is not None
    assert live.first_token_at < low.first_token_at
    assert low.answer.usage.prompt_tokens == 1 + 64 + 1


def test_the_last_slot_stays_free_beside_live_requests() -> None:
    made = driver(parallel=3)
    for i in range(4):
        made.ask(f"batch {i}", priority=-1, max_tokens=100)
    made.step()
    assert len(made.scheduler.running) == 3
    made.ask("live", max_tokens=1)
    made.run(2_000)
    begin = len(made.plans)
    for i in range(4):
        made.ask(f"more {i}", priority=-1)
    made.step()
    assert len(made.scheduler.running) == 2
    made.backend.clock.spend(60_000)
    made.step()
    assert len(made.scheduler.running) == 3
    made.run()
    assert len(made.plans) > begin


def test_work_of_low_priority_waits_a_moment_for_a_request_that_is_on_its_way() -> None:
    made = driver()
    low = made.ask("batch", priority=-1, max_tokens=100)
    made.step()
    made.loop.expect()
    held = low.sequence.n_cells
    Timer(0.05, made.ask, ("live",)).start()  # while the loop waits
    made.step()
    assert made.last_step() == (made.asked[1].sequence,)
    assert low.sequence.n_cells == held
    made.loop.expect()
    made.backend.clock.spend(1_000)
    made.asked[1].stream.cancel()
    made.step()
    assert made.last_step() == (low.sequence,), "it does not wait for ever"
    low.stream.cancel()
    made.run()
