"""What can be seen of requests under load: their time cut into disjoint stages, and what the caches did."""

import dataclasses
import itertools

import pytest
from engine_driver import Asked, Backend, Driver, limits, prompt_of, reply

from opsin.core.answer import Interval, Stage
from opsin.core.request import ImagePart, Prompt, TextPart
from opsin.engine import Engine, Policy
from opsin.engine.clock import stage_row
from opsin.testing import FakeBackend, FakeClock, image
from opsin.testing.fake_backend import TURN_TEXT


def driver(parallel: int = 4, layers: int = 1, **policy: object) -> Driver:
    size = limits(n_ctx=2000)
    backend = Backend(lambda text: text[-2:] * 200, limits=size, clock=FakeClock())
    backend.layers, backend.preprocess_ms = layers, 0.0
    return Driver(size, Policy(parallel=parallel, **policy), backend)  # type: ignore[arg-type]


def intervals(asked: Asked, stage: Stage) -> list[Interval]:
    return [interval for interval in asked.answer.intervals if interval.stage is stage and interval.count == 1]


def check(asked: Asked) -> None:
    """The intervals are disjoint and add up to the stages."""
    answer = asked.answer
    apart = [interval for interval in answer.intervals if interval.count == 1]
    for before, after in itertools.pairwise(apart):
        assert before.end <= after.start + 1e-9
    for stage in Stage:
        ms = 1e3 * sum(interval.seconds for interval in answer.intervals if interval.stage is stage)
        assert ms == pytest.approx(getattr(answer.stages, f"{stage.value}_ms"), abs=1e-6)
    parts = sum(value for name, value in stage_row(answer.stages).items() if name != "total_ms")
    assert parts == pytest.approx(answer.stages.total_ms, abs=0.01)


def test_an_encode_that_stands_still_for_others_tokens_is_queueing() -> None:
    """The turns between the encoder's layers were counted as its own time."""
    made = driver(layers=10, shortest_wait=0.0, longest_wait=0.0)
    stream = made.ask("talk", max_tokens=40)
    made.step()
    looking = made.ask(prompt_of(1), max_tokens=1)
    made.run()
    inside = sum(len(step.decode) for step in made.turns)
    assert inside >= 5
    # The driver's backend takes the time of an encode once in its layers and once behind them.
    assert looking.answer.stages.encode_ms == pytest.approx(2 * made.backend.encode_ms)
    assert looking.answer.stages.queue_ms >= inside * made.backend.decode_ms - 1e-6
    for decode, encode in itertools.product(intervals(stream, Stage.DECODE), intervals(looking, Stage.ENCODE)):
        assert decode.end <= encode.start + 1e-9 or encode.end <= decode.start + 1e-9
    check(stream)
    check(looking)


def test_a_streams_pause_is_queueing() -> None:
    made = driver(shortest_wait=10.0, longest_wait=10.0, crowded_wait=10.0)
    stream = made.ask("talk", max_tokens=40)
    for _ in range(5):
        made.step()
    made.ask(prompt_of(1), max_tokens=1)
    made.run()
    assert stream.answer.stages.queue_ms >= made.backend.encode_ms
    check(stream)


def test_many_at_once_have_disjoint_stages_each() -> None:
    made = driver(parallel=3)
    asked = [made.ask(prompt_of(f"question {i}", i % 3), max_tokens=30) for i in range(7)]
    for one in asked:
        one.sequence.clock.switch(Stage.QUEUE)  # as the façade does
    made.run()
    for one in asked:
        check(one)
    assert asked[-1].answer.stages.queue_ms > asked[0].answer.stages.total_ms


def test_counts_of_tokens_and_of_both_caches() -> None:
    made = driver()
    made.backend.reply = reply
    first = made.ask(prompt_of("a long beginning", 1), max_tokens=3)
    made.run()
    again = made.ask(prompt_of("a long beginning", 1), max_tokens=3)  # its prefix is in the KV cache
    made.run()
    other = made.ask(prompt_of("another", 1), max_tokens=3)  # only its image is known
    made.run()
    asked, now = (first, again, other), made.loop.snapshot()
    assert now.prompt_tokens == sum(a.answer.usage.prompt_tokens for a in asked)
    assert now.prefix_hits == sum(a.answer.usage.cached_tokens for a in asked) > 0
    drawn = sum(a.answer.usage.completion_tokens + (a.answer.finish_reason == "stop") for a in asked)
    assert now.generated_tokens == drawn
    assert (now.encodes, now.image_hits) == (1, 1)


def test_images_encoded_beside_another_are_no_hits() -> None:
    size = limits(n_ctx=2000)
    size = dataclasses.replace(size, encode_batch=4)
    made = Driver(size, Policy(parallel=4), Backend(reply, limits=size, clock=FakeClock()))
    for number in range(3):
        made.ask(prompt_of(number))
    made.run()
    assert (made.loop.snapshot().encodes, made.loop.snapshot().image_hits) == (3, 0)


def test_the_account_goes_back_to_when_the_caller_began_to_load_its_images() -> None:
    backend = FakeBackend(lambda _: "ok")
    side_by_side = [dataclasses.replace(image(i), fetch_ms=30.0, decode_ms=10.0) for i in range(2)]
    prompt = Prompt((*(ImagePart(one) for one in side_by_side), TextPart(TURN_TEXT)))
    with Engine(lambda: backend, now=backend.clock) as engine:
        began = backend.clock()
        backend.clock.spend(40.0)
        answer = engine.submit(prompt, waited_since=began).result()
        ended = backend.clock()
    assert (answer.stages.fetch_ms, answer.stages.image_decode_ms) == pytest.approx((30.0, 10.0))
    assert answer.stages.total_ms == pytest.approx((ended - began) * 1e3)
    assert answer.intervals[0].start == pytest.approx(began)
