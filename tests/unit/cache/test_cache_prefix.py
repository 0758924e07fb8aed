"""Who holds the longest beginning of a prompt: the hashed index against looking at everything, unit by unit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.cache.kv_cache import BLOCK, ImageUnit, Prefix, PrefixIndex, Unit

IMAGE = ImageUnit("a:0", 4, 4)
# Repeated, so that prompts are longer than a block.
prompts = st.lists(st.sampled_from([1, 2, IMAGE, (3,) * 9]), max_size=8).map(
    lambda units: ("", *(u for unit in units for u in (unit if isinstance(unit, tuple) else (unit,))))
)
held = st.tuples(prompts, st.floats(0, 1), st.booleans(), st.sampled_from(["", "salt"]))


def shared(one: tuple[Unit, ...], other: tuple[Unit, ...]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def prefix(seq_id: int, planned: tuple[Unit, ...], ready: int | None = None, *, idle: bool = False) -> Prefix:
    made = Prefix(planned)
    made.seq_id, made.ready = seq_id, len(planned) if ready is None else ready
    if idle:
        made.retire()
    return made


@given(st.lists(held, max_size=6), prompts)
def test_the_index_finds_what_looking_at_everything_finds(
    entries: list[tuple[tuple[Unit, ...], float, bool, str]], wanted: tuple[Unit, ...]
) -> None:
    index = PrefixIndex()
    best = (1, 0)
    for seq_id, (planned, part, idle, salt) in enumerate(entries):
        units = (salt, *planned[1:])
        made = prefix(seq_id, units, max(1, round(part * len(units))), idle=idle)
        index.add(made)
        coming = shared(tuple(made.units), wanted)
        if coming > 1:
            best = max(best, (coming, min(coming, made.ready)))
    match = index.match(prefix(99, wanted, 0))
    if best == (1, 0):
        assert match is None
    else:
        assert match is not None
        assert (match.coming, match.ready) == best
        assert tuple(match.prefix.units[: match.ready]) == wanted[: match.ready]


@given(prompts, st.integers(0, 100))
def test_cells_of_a_beginning_are_counted_without_looking_at_all_of_it(units: tuple[Unit, ...], count: int) -> None:
    made = prefix(0, units)
    count = min(count, len(units))
    assert made.cells(count) == sum(u.n_tokens if isinstance(u, ImageUnit) else u != "" for u in units[:count])


def test_a_lookup_looks_at_one_block_of_a_long_prompt() -> None:
    class Counted(list[Unit]):
        __slots__ = ()
        looked_at = 0

        def __getitem__(self, key: object) -> object:  # type: ignore[override]
            if isinstance(key, slice):
                Counted.looked_at += len(range(*key.indices(len(self))))
            return super().__getitem__(key)  # type: ignore[index]

    index = PrefixIndex()
    for seq_id in range(8):
        index.add(prefix(seq_id, ("", *range(6000), seq_id), idle=True))
    wanted = prefix(99, ("", *range(6000), 77), 0)
    wanted.units = Counted(wanted.units)
    Counted.looked_at = 0
    match = index.match(wanted)
    assert match is not None
    assert match.ready == 6001
    assert Counted.looked_at <= 8 * BLOCK


def test_a_prefix_that_is_being_filled_is_coming_and_an_ended_one_is_not() -> None:
    index = PrefixIndex()
    filling = prefix(0, ("", 1, 2, 3, 4), 3)
    index.add(filling)
    match = index.match(prefix(9, ("", 1, 2, 3, 9), 0))
    assert match is not None
    assert (match.ready, match.coming) == (3, 4)
    index.remove(filling)
    filling.retire()
    index.add(filling)
    match = index.match(prefix(9, ("", 1, 2, 3, 9), 0))
    assert match is not None
    assert (match.ready, match.coming) == (3, 3)


def test_the_salt_alone_is_no_match_and_another_salt_never_one() -> None:
    index = PrefixIndex()
    index.add(prefix(0, ("mine", 1, 2), idle=True))
    assert index.match(prefix(1, ("mine", 9))) is None
    assert index.match(prefix(1, ("yours", 1, 2))) is None
    assert index.match(prefix(1, ("mine", 1, 9))) is not None


def test_an_ended_sequences_answer_matches_too() -> None:
    """The next turn of a conversation begins with the whole last one."""
    index = PrefixIndex()
    running = prefix(0, ("", 1, 2))
    index.add(running)
    running.units += range(40)
    running.ready += 40
    index.remove(running)
    running.retire()
    index.add(running)
    match = index.match(prefix(1, ("", 1, 2, *range(40), 9)))
    assert match is not None
    assert match.ready == 43


def test_a_removed_prefix_is_not_found_and_leaves_nothing_behind() -> None:
    index = PrefixIndex()
    made = prefix(0, ("", *range(50)), idle=True)
    index.add(made)
    index.remove(made)
    index.remove(made)
    assert index.match(prefix(1, ("", *range(50)))) is None
    assert not index._holders


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 3 * BLOCK])
def test_a_longer_one_begins_with_a_shorter_one_that_ended(length: int) -> None:
    beginning = ("", *range(length))
    prompts = [beginning, ("", 77), (*beginning, 5)]
    short, other, long = (prefix(i, units, idle=True) for i, units in enumerate(prompts))
    assert [long.begins_with(each) for each in (short, other, long)] == [True, False, True]
    assert not short.begins_with(long)


def test_an_image_is_one_unit_with_its_cells_and_positions() -> None:
    made = prefix(0, ("salt", 1, ImageUnit("a:0", 6, 3, 2), 2))
    assert (made.cells(4), made.positions(4), made.last_position) == (8, 5, 4)
    made.ready = 3
    assert made.last_position == 3
    made.ready = 1
    assert made.last_position == -1
