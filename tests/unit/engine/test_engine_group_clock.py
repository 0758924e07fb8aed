"""Those that decode share one clock: each one's account must be what a clock of its own would have said."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from opsin.core.answer import Stage
from opsin.engine.clock import GroupClock, StageClock

GROUP_STAGES = [Stage.DECODE, Stage.SAMPLE, Stage.QUEUE, Stage.DETOKENIZE]


class FakeTime:
    def __init__(self) -> None:
        self.ticks = 0

    def __call__(self) -> float:
        return self.ticks / 1024  # sums of these are exact


@given(
    st.lists(st.tuples(st.sampled_from(GROUP_STAGES), st.integers(0, 100)), max_size=60),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_a_member_has_the_groups_stages_from_joining_to_leaving(
    life: list[tuple[Stage, int]], first: int, last: int
) -> None:
    time = FakeTime()
    group, clock = GroupClock(time), StageClock(time)
    clock.start()
    clock.switch(Stage.TEXT_PREFILL)
    expected = dict.fromkeys(Stage, 0)
    joined = min(first, len(life))
    left = min(max(first, last), len(life))
    for index, (stage, ticks) in enumerate([*life, (Stage.DECODE, 0)]):
        if index == joined:
            clock.join(group)
            clock.join(group)  # again changes nothing
        if index == left:
            clock.leave()
            clock.leave()
            clock.switch(Stage.OTHER)
        group.switch(stage)
        clock.switch(Stage.ENCODE if joined <= index < left else Stage.OTHER if index >= left else Stage.TEXT_PREFILL)
        time.ticks += ticks
        mine = stage if joined <= index < left else Stage.OTHER if index >= left else Stage.TEXT_PREFILL
        expected[mine] += ticks
    clock.leave()
    stages = clock.freeze()
    assert {s: getattr(stages, f"{s.value}_ms") * 1.024 for s in Stage} == expected
    assert stages.total_ms * 1.024 == sum(expected.values())
    told = clock.intervals()
    for stage in Stage:
        assert math.fsum(i.seconds for i in told if i.stage is stage) * 1024 == expected[stage]
