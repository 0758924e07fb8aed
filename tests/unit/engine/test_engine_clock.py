from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.core.answer import Stage, Stages
from opsin.engine.clock import StageClock, stage_row, timings


class FakeTime:
    """Seconds in steps of 1/1024, so that sums of floats are exact."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def pass_ticks(self, ticks):
        self.seconds += ticks / 1024


@pytest.fixture
def time():
    return FakeTime()


def ticks(ms):
    return ms * 1024 / 1e3


def parts(stages):
    return {name: value for name, value in stage_row(stages).items() if name != "total_ms" and value}


def sum_of(stages):
    return math.fsum(getattr(stages, f"{stage.value}_ms") for stage in Stage)


def test_a_nested_stage_suspends_the_outer_one(time):
    clock = StageClock(time)
    clock.start()
    time.pass_ticks(1)
    with clock.stage(Stage.ENCODE):
        time.pass_ticks(2)
        with clock.stage(Stage.DECODE):
            time.pass_ticks(4)
        time.pass_ticks(8)
    time.pass_ticks(16)
    stages = clock.freeze()
    assert ticks(stages.encode_ms) == 10
    assert ticks(stages.decode_ms) == 4
    assert ticks(stages.other_ms) == 17
    assert ticks(stages.total_ms) == 31


def test_a_stage_ends_when_its_block_raises(time):
    clock = StageClock(time)

    def fail():
        with clock.stage(Stage.ENCODE):
            time.pass_ticks(3)
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    time.pass_ticks(5)
    assert ticks(clock.freeze().encode_ms) == 3
    assert ticks(clock.freeze().other_ms) == 5


def test_switch_replaces_the_innermost_stage_only(time):
    clock = StageClock(time)
    clock.start()
    clock.switch(Stage.QUEUE)
    time.pass_ticks(1)
    with clock.stage(Stage.SAMPLE):
        clock.switch(Stage.DETOKENIZE)
        time.pass_ticks(2)
    time.pass_ticks(4)
    clock.switch(Stage.OTHER)
    time.pass_ticks(8)
    stages = clock.freeze()
    assert [ticks(ms) for ms in (stages.queue_ms, stages.detokenize_ms, stages.other_ms)] == [5, 2, 8]
    assert stages.sample_ms == 0


def test_time_before_the_start_lengthens_the_total(time):
    clock = StageClock(time)
    clock.add(Stage.FETCH, 250.0)
    clock.add(Stage.LOAD, -1.0)
    clock.start()
    time.pass_ticks(512)
    stages = clock.freeze()
    assert (stages.fetch_ms, stages.other_ms, stages.load_ms, stages.total_ms) == (250.0, 500.0, 0.0, 750.0)


def test_images_loaded_side_by_side_take_no_more_than_the_wall_time(time):
    """Two images took 400 ms each to fetch and 100 to decode, at the same time, behind 250 of loading the model."""
    clock = StageClock(time)
    began = time()
    time.pass_ticks(768)
    clock.add(Stage.LOAD, 250.0)
    for _ in range(2):
        clock.add(Stage.FETCH, 400.0)
        clock.add(Stage.IMAGE_DECODE, 100.0)
    clock.waited_since(began)
    clock.start()
    time.pass_ticks(256)
    stages = clock.freeze()
    assert (stages.load_ms, stages.fetch_ms, stages.image_decode_ms) == (250.0, 400.0, 100.0)
    assert (stages.other_ms, stages.total_ms) == (250.0, 1000.0)
    assert clock.intervals()[0].start == began


def test_time_before_the_start_for_which_nothing_was_added_is_nobodys(time):
    clock = StageClock(time)
    began = time()
    time.pass_ticks(512)
    clock.add(Stage.FETCH, 125.0)
    clock.waited_since(began)
    clock.start()
    stages = clock.freeze()
    assert (stages.fetch_ms, stages.other_ms, stages.total_ms) == (125.0, 375.0, 500.0)
    assert clock.intervals()[0].start == began


def test_freezing_takes_an_image_and_the_clock_runs_on(time):
    clock = StageClock(time)
    clock.start()
    with clock.stage(Stage.ENCODE):
        time.pass_ticks(1)
        early = clock.freeze()
        time.pass_ticks(1)
    assert ticks(early.encode_ms) == 1
    assert ticks(clock.freeze().encode_ms) == 2


def test_a_clock_never_started_shows_nothing(time):
    assert StageClock(time).freeze() == Stages()


def test_starting_again_changes_nothing(time):
    clock = StageClock(time)
    clock.start()
    time.pass_ticks(4)
    clock.start()
    assert ticks(clock.freeze().total_ms) == 4


# A request's life as a tree: wait, switch, add, or a stage with a life of its own inside.
stage_names = st.sampled_from(list(Stage))
steps = st.one_of(
    st.tuples(st.just("wait"), st.integers(0, 5000)),
    st.tuples(st.just("switch"), stage_names),
    st.tuples(st.just("add"), stage_names, st.integers(0, 4000)),
)
lives = st.recursive(
    st.lists(steps, max_size=5),
    lambda inner: st.lists(st.one_of(steps, st.tuples(st.just("stage"), stage_names, inner)), max_size=5),
    max_leaves=30,
)


def live(clock, time, life):
    for name, *rest in life:
        if name == "wait":
            time.pass_ticks(rest[0])
        elif name == "switch":
            clock.switch(rest[0])
        elif name == "stage":
            with clock.stage(rest[0]):
                live(clock, time, rest[1])
        else:
            clock.add(rest[0], rest[1] * 1000 / 1024)


def waited(life):
    return sum(
        step[1] if step[0] == "wait" else waited(step[2]) if step[0] == "stage" else step[2] * (step[0] == "add")
        for step in life
        if step[0] in {"wait", "stage", "add"}
    )


@given(lives)
def test_any_life_adds_up_exactly(life):
    time = FakeTime()
    clock = StageClock(time)
    clock.start()
    live(clock, time, life)
    stages = clock.freeze()
    assert sum_of(stages) == stages.total_ms
    assert ticks(stages.total_ms) == waited(life)
    assert all(getattr(stages, f"{stage.value}_ms") >= 0 for stage in Stage)
    told = clock.intervals()
    for stage in Stage:
        seconds = math.fsum(interval.seconds for interval in told if interval.stage is stage)
        assert seconds * 1e3 == getattr(stages, f"{stage.value}_ms")
    assert len({interval.stage for interval in told if interval.start >= clock._started}) == sum(
        interval.start >= clock._started for interval in told
    )


def test_intervals_tell_when_a_stage_ran_and_join_what_belongs_together(time):
    clock = StageClock(time)
    clock.add(Stage.FETCH, 250.0)
    clock.start()
    clock.switch(Stage.QUEUE)
    time.pass_ticks(1024)
    with clock.stage(Stage.PREPROCESS):  # takes no time
        pass
    time.pass_ticks(1024)
    clock.switch(Stage.ENCODE)
    time.pass_ticks(512)
    clock.freeze()
    told = [(i.stage, i.start, i.end, i.count) for i in clock.intervals()]
    assert told == [
        (Stage.FETCH, 999.75, 1000.0, 1),
        (Stage.QUEUE, 1000.0, 1002.0, 1),
        (Stage.ENCODE, 1002.0, 1002.5, 1),
    ]


def test_timings_speak_of_what_was_computed():
    stages = Stages(
        encode_ms=300, image_prefill_ms=150, text_prefill_ms=50, decode_ms=180, sample_ms=15, detokenize_ms=5
    )
    made = timings(stages, prompt_tokens=600, cached_tokens=100, predicted_tokens=20)
    assert (made.cache_n, made.prompt_n, made.prompt_ms) == (100, 500, 500)
    assert (made.prompt_per_token_ms, made.prompt_per_second) == (1, 1000)
    assert (made.predicted_n, made.predicted_ms) == (20, 200)
    assert (made.predicted_per_token_ms, made.predicted_per_second) == (10, 100)


def test_timings_of_nothing_are_zero():
    made = timings(Stages(), prompt_tokens=5, cached_tokens=5, predicted_tokens=0)
    assert (made.prompt_n, made.prompt_per_token_ms, made.prompt_per_second) == (0, 0, 0)
    assert (made.predicted_per_token_ms, made.predicted_per_second) == (0, 0)
