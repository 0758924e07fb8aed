"""Batch work beside live requests: it fills what is left and gives way at once."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from threading import Timer
from unittest.mock import Mock

import pytest
from engine_driver import Asked, Backend, Driver, limits, prompt_of

from opsin.cache.kv_cache import SwapOut
from opsin.core.backend import BackendLimits
from opsin.core.request import EmbeddingRows, TokenBatch
from opsin.engine import Policy
from opsin.engine.request import State
from opsin.engine.step import PrefillImage, Tokens, members_of
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


def in_the_midst_of_an_encode(made: Driver, arriving: Callable[[], object]) -> Asked:
    """A batch row whose image is being encoded when `arriving` is called, and later has been."""
    made.backend.layers = 10
    low = made.ask(prompt_of(1), priority=-1)
    spend, left = made.backend.clock.spend, [3]

    def spending(ms: float) -> None:
        spend(ms)
        left[0] -= 1
        if left[0] == 0:
            arriving()

    made.backend.clock.spend = spending  # type: ignore[method-assign]
    while left[0] > 0:
        made.step()
    return low


def test_an_encode_of_low_priority_ends_early_for_a_live_image_and_is_done_again() -> None:
    made = driver()
    low = in_the_midst_of_an_encode(made, lambda: made.ask(prompt_of(2)))
    assert made.backend.encoded == [], "it was not finished"
    assert low.sequence.embedding is None
    made.run()
    order = [name.partition(":")[0] for name in made.backend.encoded]
    live = made.asked[1]
    assert order == [image(2).sha256, image(1).sha256]
    assert live.first_token_at is not None
    assert low.first_token_at is not None
    assert live.first_token_at < low.first_token_at


@pytest.mark.parametrize("prompt", [("hello",), (9, "a known image")])
def test_an_encode_of_low_priority_stands_still_for_a_live_request_that_needs_no_encoder(
    prompt: tuple[str | int, ...],
) -> None:
    made = driver()
    made.ask(prompt_of(9, "before"), max_tokens=1)
    made.run()
    before, seconds = len(made.backend.encoded), made.loop.snapshot().encode_seconds
    low = in_the_midst_of_an_encode(made, lambda: made.ask(prompt_of(*prompt), max_tokens=5))
    live = made.asked[-1]
    assert len(live.sequence.output.tokens) >= 1, "within the encode"
    assert len(made.backend.encoded) == before + 1, "which went on to its end"
    assert low.sequence.embedding is not None
    made.run()
    assert len(made.backend.encoded) == before + 1
    stages, alone = low.answer.stages, driver()
    other = alone.ask(prompt_of(1), priority=-1)
    alone.run()
    assert stages.encode_ms == pytest.approx(other.answer.stages.encode_ms)
    assert made.loop.snapshot().encode_seconds - seconds == pytest.approx(stages.encode_ms / 1e3)
    assert low.answer.text == other.answer.text


@pytest.mark.parametrize("live_too", [False, True])
def test_a_batch_row_that_ends_while_its_encode_stands_still_is_freed_behind_it(live_too: bool) -> None:
    made = driver()

    def arriving() -> None:
        if live_too:
            made.ask("hello", max_tokens=1)
        made.asked[0].stream.cancel()
        made.loop.expect()

    low = in_the_midst_of_an_encode(made, arriving)
    made.run()
    assert low.sequence.state is State.DONE
    assert made.backend.encoded == []
    assert made.scheduler.idle


def test_a_batch_row_whose_encode_stands_still_may_lose_its_place() -> None:
    made = driver(parallel=1)
    low = in_the_midst_of_an_encode(made, lambda: made.ask("hello", max_tokens=3))
    live = made.asked[-1]
    made.run()
    assert made.scheduler.preemptions == 1
    assert live.ended_at is not None
    assert low.ended_at is not None
    assert live.ended_at < low.ended_at


def test_what_needs_the_backend_waits_for_the_end_of_an_encode_and_not_for_all_of_it() -> None:
    made = driver()
    asked: list[Future[bool]] = []

    def arriving() -> None:
        asked.append(made.loop.call(lambda backend: made.loop._paused is None))
        made.loop.expect()

    in_the_midst_of_an_encode(made, arriving)
    made.run()
    assert asked[0].result(0)


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("cpu", [False, True])
def test_a_live_stream_has_its_share_of_the_time_beside_batch_rows(share: float, cpu: bool) -> None:
    made = driver(low_stream_share=share, rows_cost=cpu, decode_in_encode=cpu)
    made.backend.layers = 10
    for i in range(40):
        made.ask(prompt_of(i), priority=-1, max_tokens=40)
    made.step()
    live = made.ask("talk", max_tokens=200)
    while live.first_token_at is None:
        made.step()
    clock, tokens, begin = made.backend.clock, len(live.sequence.output.tokens), len(made.backend.encoded)
    began = clock()
    while not live.stream.done:
        made.step()
    alone = (200 - tokens) * made.backend.decode_ms / 1e3
    # More while all slots are answered: here a step takes no longer for it.
    assert share - 0.05 < alone / (clock() - began) < 0.9
    assert bool(made.turns) is cpu, "within encodes, too"
    assert len(made.backend.encoded) >= begin + 2, "the batch gets on"


def test_batch_rows_that_are_answered_do_not_slow_a_live_stream_down_where_each_takes_its_time() -> None:
    """As on a CPU: a step takes as long as it has rows."""
    made = driver(low_stream_share=0.8)
    decode = made.backend.decode

    def slow(rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
        if isinstance(rows, TokenBatch):
            made.backend.clock.spend(made.backend.decode_ms * (len(rows.outputs) - 1))
        return decode(rows, may_stop=may_stop)

    made.backend.decode = slow  # type: ignore[method-assign]
    low = [made.ask(f"batch {i}", priority=-1, max_tokens=500) for i in range(3)]
    for _ in range(5):
        made.step()
    live = made.ask("talk", max_tokens=200)
    while live.first_token_at is None:
        made.step()
    began, before = made.backend.clock(), len(low[0].sequence.output.tokens)
    while not live.stream.done:
        made.step()
    alone = 199 * made.backend.decode_ms / 1e3
    assert alone / (made.backend.clock() - began) == pytest.approx(0.8, abs=0.05)
    assert len(low[0].sequence.output.tokens) > before + 10, "which goes on"


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


def parking(rows: int, swap_cells: int = 2000, **policy: object) -> Driver:
    made = driver(size=limits(n_ctx=1000, n_ubatch=64), swap_cells=swap_cells, park_beside=32, **policy)
    for i in range(rows):
        made.ask(prompt_of(i), priority=-1, max_tokens=20 + i)
    return made


def beside_fills(made: Driver) -> list[int]:
    """How many cells others held while an image's rows were computed."""
    found: list[int] = []
    decode = made.backend.decode

    def noting(rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
        if isinstance(rows, EmbeddingRows):
            found.append(made.scheduler.kv.cells.used - made.scheduler.kv.cells.held(rows.seq_id))
        return decode(rows, may_stop=may_stop)

    made.backend.decode = noting  # type: ignore[method-assign]
    return found


def test_batch_rows_that_are_answered_leave_the_cache_while_another_prompt_is_filled() -> None:
    made = parking(7, parallel=4)
    held, kv = beside_fills(made), made.scheduler.kv
    parked = kv.park = Mock(side_effect=kv.park)  # type: ignore[method-assign]
    made.run()
    assert len(held) == 7
    assert max(held) <= 3, "the first tokens of prompts, and no image"
    decoded = [len(plan.step.decode) for plan in made.plans if isinstance(plan.step, Tokens) and not plan.step.prefill]
    assert max(decoded) == 4
    assert len(made.backend.encoded) == 7, "no image is read twice"
    usages = [one.answer.usage for one in made.asked]
    computed = sum(usage.prompt_tokens - usage.cached_tokens for usage in usages)
    assert made.loop.snapshot().prefill_tokens == computed + parked.call_count, "no row is computed twice"
    assert parked.call_count == sum(one.sequence.preemptions for one in made.asked) > 3
    assert made.scheduler.preemptions == 0
    alone = driver(parallel=1)
    texts = [alone.ask(prompt_of(i), max_tokens=20 + i) for i in range(7)]
    alone.run()
    assert [one.answer.text for one in made.asked] == [one.answer.text for one in texts]


def test_a_live_prompt_is_filled_beside_no_batch_row_and_they_go_on_behind_it() -> None:
    made = parking(3, parallel=4)
    while sum(bool(one.sequence.output.tokens) for one in made.asked) < 3:
        made.step()
    held = beside_fills(made)
    live = made.ask(prompt_of(9), max_tokens=1)
    made.run()
    assert held == [0]
    assert live.ended_at is not None
    assert all(one.ended_at is not None and live.ended_at < one.ended_at for one in made.asked[:3])


@pytest.mark.parametrize(("swap_cells", "parallel"), [(0, 4), (100, 4), (270, 4)])
def test_where_main_memory_has_no_room_batch_rows_stay_in_the_cache(swap_cells: int, parallel: int) -> None:
    made = parking(4, swap_cells, parallel=parallel)
    held = beside_fills(made)
    made.run()
    assert max(held) >= 64
    assert len(made.backend.encoded) == 4


@pytest.mark.parametrize("labels", [False, True])
def test_parked_rows_are_not_passed_for_ever(labels: bool) -> None:
    size = limits(n_ctx=600 if labels else 200, n_ubatch=64, n_seq_max=10)
    made = driver(parallel=6, size=size, swap_cells=400, park_beside=32)
    for i in range(30):
        first_token = labels and i >= 5
        made.ask(prompt_of(i), priority=-1, max_tokens=1 if first_token else 20)
    made.run()
    ends = [one.ended_at or 0 for one in made.asked]
    assert max(ends[:2]) < (ends[-1] if labels else min(ends[20:])), "the first ones do not wait for the last ones"


def test_rows_about_one_image_share_its_cells_and_stay_in_the_cache() -> None:
    made = parking(0, parallel=5)
    for i in range(4):
        made.ask(prompt_of(1, f"{i}"), priority=-1, max_tokens=60)
    made.ask(prompt_of(2), priority=-1, max_tokens=60)
    made.run()
    assert max(len(plan.step.decode) for plan in made.plans if isinstance(plan.step, Tokens)) == 5
    assert not any(isinstance(op, SwapOut) for plan in made.plans[:-5] for op in plan.memory)


def test_a_parked_row_ends_with_its_reader() -> None:
    made = parking(3, parallel=3)
    while not made.asked[0].sequence.parked:
        made.step()
    made.asked[0].stream.cancel()
    made.run()
    assert made.scheduler.idle


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
