"""Thousands of intervals in bounded memory: the first and the long ones as they were, the others added up."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from opsin.core.stages import Interval, Stage
from opsin.engine.intervals import FIRST, LONGEST, Intervals


@given(
    st.lists(st.tuples(st.sampled_from([Stage.DECODE, Stage.SAMPLE, Stage.QUEUE]), st.integers(0, 50)), max_size=300)
)
def test_no_time_is_lost_and_the_first_and_longest_stay_as_they_were(life: list[tuple[Stage, int]]) -> None:
    kept, now, all_of_it = Intervals(), 0.0, []
    for stage, ticks in life:
        kept.add(stage, now, now + ticks / 64)
        all_of_it.append(Interval(stage, now, now + ticks / 64, ticks / 64))
        now += ticks / 64
    told = kept.told()
    assert len(told) <= FIRST + LONGEST + len(Stage)
    assert [i.start for i in told] == sorted(i.start for i in told)
    for stage in Stage:
        mine = [i for i in all_of_it if i.stage is stage and i.seconds]
        assert math.fsum(i.seconds for i in told if i.stage is stage) == math.fsum(i.seconds for i in mine)
        assert sum(i.count for i in told if i.stage is stage) == len(mine)
    real = [i for i in all_of_it if i.seconds]
    assert set(real[:FIRST]) <= set(told)
    longest = sorted((i.seconds for i in real[FIRST:]), reverse=True)[:LONGEST]
    apart = sorted((i.seconds for i in told if i.count == 1 and i not in real[:FIRST]), reverse=True)
    assert apart[: len(longest)] == longest


def test_a_pause_late_in_a_long_answer_is_told() -> None:
    kept = Intervals()
    for token in range(1000):
        kept.add(Stage.DECODE, token, token + 0.01)
    kept.add(Stage.QUEUE, 1000.0, 1000.7)
    for token in range(1001, 2000):
        kept.add(Stage.DECODE, token, token + 0.01)
    assert Interval(Stage.QUEUE, 1000.0, 1000.7, 1000.7 - 1000.0) in kept.told()
