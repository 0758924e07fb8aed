"""Who holds the longest beginning of a prompt: the index against looking at everything, unit by unit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.cache import ImageUnit, NoPrefixes, Prefix, PrefixIndex, Unit

PICTURE = ImageUnit("a:0", 4, 4)
prompts = st.lists(st.sampled_from([1, 2, PICTURE]), max_size=8).map(lambda units: ("", *units))
held = st.tuples(prompts, st.floats(0, 1), st.booleans(), st.sampled_from(["", "salt"]))


def shared(one: tuple[Unit, ...], other: tuple[Unit, ...]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def prefix(seq_id: int, planned: tuple[Unit, ...], ready: int | None = None, *, idle: bool = False) -> Prefix:
    units = planned[: len(planned) if ready is None else ready]
    return Prefix(seq_id, list(units), planned, idle=idle)


@pytest.mark.slow
@given(st.lists(held, max_size=6), prompts)
def test_the_index_finds_what_looking_at_everything_finds(
    entries: list[tuple[tuple[Unit, ...], float, bool, str]], wanted: tuple[Unit, ...]
) -> None:
    index = PrefixIndex()
    best = (1, 0)
    for seq_id, (planned, part, idle, salt) in enumerate(entries):
        units = (salt, *planned[1:])
        made = prefix(seq_id, units, None if idle else max(1, round(part * len(units))), idle=idle)
        index.add(made)
        ready = shared(tuple(made.units), wanted)
        coming = ready if idle else shared(made.planned, wanted)
        best = max(best, (coming, ready)) if coming > 1 else best
    match = index.match(wanted)
    if best == (1, 0):
        assert match is None
    else:
        assert match is not None
        assert (match.coming, match.ready) == best
        assert tuple(match.prefix.units[: match.ready]) == wanted[: match.ready]


def test_a_prefix_that_is_being_filled_is_coming_and_an_idle_one_is_not() -> None:
    index = PrefixIndex()
    filling = prefix(0, ("", 1, 2, 3, 4), 3)
    index.add(filling)
    match = index.match(("", 1, 2, 3, 9))
    assert match is not None
    assert (match.ready, match.coming) == (3, 4)
    filling.idle = True
    match = index.match(("", 1, 2, 3, 9))
    assert match is not None
    assert (match.ready, match.coming) == (3, 3)


def test_the_salt_alone_is_no_match_and_another_salt_never_one() -> None:
    index = PrefixIndex()
    index.add(prefix(0, ("mine", 1, 2), idle=True))
    assert index.match(("mine", 9)) is None
    assert index.match(("yours", 1, 2)) is None
    assert index.match(("mine", 1, 9)) is not None


def test_answered_tokens_match_too() -> None:
    """The next turn of a conversation begins with the whole last one."""
    index = PrefixIndex()
    running = prefix(0, ("", 1, 2))
    running.units += [7, 8]
    index.add(running)
    match = index.match(("", 1, 2, 7, 8, 9))
    assert match is not None
    assert match.ready == 5


def test_the_oldest_idle_is_the_one_used_longest_ago() -> None:
    index = PrefixIndex()
    made = [prefix(i, ("", i), idle=True) for i in range(3)]
    for each in made:
        index.add(each)
    index.add(prefix(9, ("", 9)))
    assert index.oldest_idle() is made[0]
    index.touch(made[0])
    assert index.oldest_idle() is made[1]
    index.remove(made[1])
    index.remove(made[1])
    assert index.oldest_idle() is made[2]


def test_removing_an_old_entry_does_not_remove_the_new_one_of_the_same_id() -> None:
    index = PrefixIndex()
    old, new = prefix(0, ("", 1), idle=True), prefix(0, ("", 2), idle=True)
    index.add(old)
    index.add(new)
    index.remove(old)
    assert index.oldest_idle() is new


def test_idle_ones_that_a_longer_one_begins_with_are_found() -> None:
    index = PrefixIndex()
    short, other, long = (prefix(i, u, idle=True) for i, u in enumerate([("", 1), ("", 2), ("", 1, 2)]))
    for each in (short, other, long):
        index.add(each)
    assert index.idle_within(long) == [short]
    assert index.idle_within(short) == []


def test_the_twin_never_matches() -> None:
    twin = NoPrefixes()
    made = prefix(0, ("", 1, 2), idle=True)
    twin.add(made)
    twin.touch(made)
    assert twin.match(("", 1, 2)) is None
    assert twin.oldest_idle() is None
    assert twin.idle_within(made) == []
    twin.remove(made)
