"""The search on made-up costs with noise and a clock of its own: what it finds, drops, refuses, and leaves undone."""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.core.errors import ModelError
from opsin.tune.pareto import Point, pareto, pick
from opsin.tune.search import Choice, Cost, Dimension, Found, Part, Ratio, Search, ratio_of


class World:
    """A machine: what settings cost, how noisy it is, how it drifts, and how long a measurement takes."""

    def __init__(
        self, cost: Callable[[Mapping[str, Any]], Cost], *, noise: float = 0.02, drift: float = 0.0, seed: int = 1
    ) -> None:
        self.cost, self.noise, self.drift = cost, noise, drift
        self.clock = 0.0
        self.random = random.Random(seed)
        self.runs: Counter[str] = Counter()
        self.open = 0

    def now(self) -> float:
        return self.clock

    def trial(self, choice: Choice, part: Part) -> "_Trial":
        assert part == "language"
        if choice.get("kv") == "impossible":
            raise ModelError("no such memory")
        self.open += 1
        return _Trial(self, choice)

    def search(self, *dimensions: Dimension, deadline: float = 1e9, **more: Any) -> Found:
        found = Search(self.trial, noise=3 * self.noise + 0.01, deadline=deadline, now=self.now, **more).run(dimensions)
        assert self.open == 0
        return found


class _Trial:
    def __init__(self, world: World, choice: Choice) -> None:
        self.world, self.choice = world, choice

    def run(self) -> Cost:
        world = self.world
        world.clock += 1.0
        world.runs[repr(dict(self.choice))] += 1
        factor = world.random.gauss(1.0, world.noise) * (1.0 + world.drift * world.clock)
        cost = world.cost(self.choice)
        return Cost(cost.latency * factor, cost.batch * factor)

    def close(self) -> None:
        self.world.open -= 1


def dimension(name: str, *values: Any, checked: bool = False) -> Dimension:
    return Dimension(name, "language", tuple({name: value} for value in values), checked)


def bowl(choice: Mapping[str, Any]) -> Cost:
    """Best at a = 3 and b = 1, which is 40 % better than untuned (a = 0, b = 0)."""
    seconds = 1.0 + 0.1 * abs(choice.get("a", 0) - 3) + 0.1 * abs(choice.get("b", 0) - 1)
    return Cost(seconds, seconds)


@pytest.mark.parametrize("drift", [0.0, 0.01])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_is_found_through_noise_and_drift(seed: int, drift: float) -> None:
    # Drift by a percent a measurement doubles all times on the way: what comes later would always lose.
    found = World(bowl, drift=drift, seed=seed).search(dimension("a", 1, 2, 3, 4), dimension("b", 1, 2))
    assert found.best["both"] == {"a": 3, "b": 1}
    assert not found.out_of_time


def test_what_makes_no_difference_is_not_chosen() -> None:
    chosen = [
        World(lambda _: Cost(1, 1), noise=0.05, seed=s).search(dimension("a", 1, 2)).best["both"] for s in range(20)
    ]
    # Six rounds within two standard errors and a percent: a false win stays rare.
    assert sum(map(bool, chosen)) <= 2


def test_a_clear_loser_is_measured_once() -> None:
    world = World(lambda choice: Cost(2, 2) if choice.get("a") else Cost(1, 1))
    found = world.search(dimension("a", 1))
    assert found.best["both"] == {}
    assert found.tried[0].rounds == 1
    assert world.runs["{'a': 1}"] == 1


def test_what_wins_one_figure_and_loses_the_other_is_kept_for_the_first_alone() -> None:
    found = World(lambda c: Cost(0.7, 1.6) if c.get("a") else Cost(1, 1)).search(dimension("a", 1))
    assert found.best == {"latency": {"a": 1}, "throughput": {}, "both": {}}


def test_what_is_beyond_tolerance_is_never_chosen_and_says_why() -> None:
    asked = []

    def admit(choice: Choice) -> str | None:
        asked.append(choice)
        return "too far" if choice.get("a") == 3 else None

    found = World(bowl).search(dimension("a", 2, 3, checked=True), dimension("b", 1), admit=admit)
    assert found.best["both"] == {"a": 2, "b": 1}
    assert [tried.verdict for tried in found.tried] == ["better", "refused: too far", "better"]
    # Only what won is worth the check, and only where answers may change.
    assert asked == [{"a": 2}, {"a": 3}]


def test_what_cannot_be_opened_is_a_finding() -> None:
    found = World(bowl).search(dimension("kv", "impossible"), dimension("a", 3))
    assert found.tried[0].verdict == "not possible: no such memory"
    assert found.best["both"] == {"a": 3}


@pytest.mark.parametrize("deadline", [0.5, 3.0, 10.0, 20.0])
def test_no_measurement_begins_after_the_time_is_over(deadline: float) -> None:
    world = World(lambda _: Cost(1, 1))
    found = world.search(*(dimension(name, 1, 2) for name in "abcdef"), deadline=deadline)
    assert world.clock <= deadline + 2  # a pair that was begun is ended
    assert found.out_of_time
    assert len(found.tried) == 12
    assert found.tried[-1].verdict == "no time left"


def test_known_values_of_the_untuned_settings_are_not_tried() -> None:
    found = World(bowl).search(dimension("a", 0, 3), untuned={"a": 0})
    assert [dict(tried.choice) for tried in found.tried] == [{"a": 3}]


def test_a_ratio_is_of_pairs_with_the_noise_of_its_rounds() -> None:
    ratio = ratio_of([2.0, 2.0, 2.2], [1.0, 1.0, 1.1], 0.05)
    assert ratio.value == pytest.approx(2.0)
    # Rounds that agree by chance are not less noisy than the machine.
    assert ratio.noise == pytest.approx(0.05 / 3**0.5)
    # The machine became twice as slow between rounds: no pair saw a difference, medians of each side would.
    assert ratio_of([1.0, 2.0, 1.0, 2.0], [1.0, 2.0, 1.0, 2.0], 0.01).value == pytest.approx(1.0)
    assert ratio_of([1.0, 4.0, 2.0], [2.0, 2.0, 2.0], 0.01).value == pytest.approx(1.0)
    assert ratio_of([2.0], [1.0], 0.5).noise == 0.5
    noisy = ratio_of([0.5, 1.5, 0.9], [1.0, 1.0, 1.0], 0.5)
    assert noisy.noise > 0.5
    assert not noisy.wins


def test_fewer_than_three_rounds_win_nothing() -> None:
    assert [ratio_of([0.5] * n, [1.0] * n, 0.01).wins for n in (1, 2, 3)] == [False, False, True]
    # Student's t: of three rounds one standard error is worth 4.3.
    assert ratio_of([0.9, 0.95, 1.0], [1.0] * 3, 0.0).noise == pytest.approx(4.30 * 0.0527 / 3**0.5, rel=0.01)


def test_what_the_time_cut_short_is_not_called_no_better() -> None:
    found = World(lambda c: Cost(0.9, 0.9) if c.get("a") else Cost(1, 1)).search(dimension("a", 1), deadline=3.0)
    assert found.tried[0].verdict == "no time left"
    assert found.out_of_time


def test_a_candidate_is_not_begun_when_it_can_be_foreseen_to_end_late() -> None:
    world = World(lambda _: Cost(1, 1))
    found = world.search(dimension("a", 1), deadline=10.0, expected=11.0)
    assert (found.tried[0].verdict, world.clock) == ("no time left", 0.0)


def test_while_nothing_has_won_the_search_goes_on_into_the_time_of_the_finals() -> None:
    names = [dimension(name, 1) for name in "abcdef"]
    nothing = World(lambda _: Cost(1, 1)).search(*names, deadline=5.0, last=1e9)
    assert [tried.verdict for tried in nothing.tried] == ["no better"] * 6
    won = World(lambda c: Cost(0.8, 0.8) if c.get("b") else Cost(1, 1)).search(*names, deadline=5.0, last=1e9)
    assert [tried.verdict for tried in won.tried] == ["no better", "better", *["no time left"] * 4]


points = st.lists(
    st.builds(
        lambda number, latency, answers: Point(f"p{number}", latency, answers),
        st.integers(),
        st.integers(1, 6).map(float),
        st.integers(1, 6).map(float),
    ),
    min_size=1,
    max_size=12,
)


@given(points)
def test_the_pareto_set_is_what_nobody_beats_and_everybody_else_is_beaten(found: list[Point]) -> None:
    front = pareto(found)
    assert front
    for point in found:
        better = [
            other
            for other in found
            if other.latency_s <= point.latency_s
            and other.answers_s >= point.answers_s
            and (other.latency_s, other.answers_s) != (point.latency_s, point.answers_s)
        ]
        assert (point in front) == (not better)
        # Whoever is beaten is beaten by one of the front.
        assert point in front or any(other in front for other in better)
    assert list(front) == sorted(front, key=lambda point: point.latency_s)


def point(name: str, latency: float, batch: float, noise: float = 0.01) -> Point:
    return Point(name, latency, 1 / batch, Ratio(latency, noise), Ratio(batch, noise))


def test_a_profile_takes_its_own_best_and_ruins_nothing() -> None:
    untuned, quick, busy = point("untuned", 1, 1, 0), point("quick", 0.8, 1.04), point("busy", 1.02, 0.7)
    ruin = point("ruin", 0.5, 1.2)
    assert pick([untuned, quick, busy, ruin], "interactive") is quick
    assert pick([untuned, quick, busy, ruin], "throughput") is busy


def test_within_the_noise_the_untuned_settings_stay() -> None:
    untuned = point("untuned", 1, 1, 0)
    assert pick([untuned, point("maybe", 0.97, 0.9, noise=0.05)], "interactive") is untuned


def test_of_equals_the_one_that_is_better_in_the_other_figure() -> None:
    untuned, one, other = point("untuned", 1, 1, 0), point("one", 0.8, 1.0), point("other", 0.803, 0.8)
    assert pick([untuned, one, other], "interactive") is other
