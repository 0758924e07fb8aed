"""A prompt as a key: one unit a token, one a picture chunk."""

from hypothesis import given
from hypothesis import strategies as st

from opsin.cache import ImageUnit, shared_units, units_of
from opsin.cache.units import cells_of, positions_of
from opsin.core.layout import ImageRun, TextRun

tokens = st.lists(st.integers(0, 2), max_size=40)


def test_a_picture_is_one_unit_and_a_token_another() -> None:
    runs = [TextRun((1, 2)), ImageRun("a:0", 0, 576, 24), TextRun((3,))]
    units = units_of(runs, "key")
    assert units == ("key", 1, 2, ImageUnit("a:0", 576, 24), 3)
    assert cells_of(units) == 2 + 576 + 1
    assert positions_of(units) == 2 + 24 + 1


def test_the_same_picture_at_another_size_is_another_unit() -> None:
    one, other = (units_of([ImageRun("a:0", 0, n, n)]) for n in (4, 8))
    assert shared_units(one, other) == 1


def test_prompts_of_different_salt_share_nothing() -> None:
    runs = [TextRun((1, 2, 3))]
    assert shared_units(units_of(runs, "mine"), units_of(runs, "yours")) == 0
    assert shared_units(units_of(runs, "mine"), units_of(runs, "mine")) == 4


@given(tokens, tokens)
def test_shared_units_is_what_counting_one_by_one_says(one: list[int], other: list[int]) -> None:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    assert shared_units(one, other) == count
    assert shared_units(tuple(one), tuple(other)) == count
