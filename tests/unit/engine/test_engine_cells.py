"""The book of cells against a plain model: every sequence is a list of cells, forks share the cells themselves."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.cache.kv_cache import CellBook

ids = st.integers(0, 4)
calls = st.one_of(
    st.tuples(st.just("append"), ids, st.integers(1, 9)),
    st.tuples(st.just("fork"), ids, ids, st.floats(0, 1)),
    st.tuples(st.just("drop"), ids),
)


@given(st.lists(calls, max_size=40))
def test_any_history_counts_as_real_cells_would(history: list[tuple[Any, ...]]) -> None:
    book = CellBook()
    plain: dict[int, list[object]] = {seq_id: [] for seq_id in range(5)}
    for name, seq_id, *rest in history:
        if name == "append":
            book.append(seq_id, rest[0])
            plain[seq_id] += [object() for _ in range(rest[0])]
        elif name == "fork" and not plain[rest[0]] and seq_id != rest[0]:
            cells = round(rest[1] * len(plain[seq_id]))
            if cells:
                book.fork(seq_id, rest[0], cells)
                plain[rest[0]] = plain[seq_id][:cells]
        elif name == "drop":
            book.drop(seq_id)
            plain[seq_id] = []
        book.check()
        assert book.used == len({id(cell) for cells in plain.values() for cell in cells})
        for each, cells in plain.items():
            assert book.held(each) == len(cells)
        some = [0, 2, 3]
        assert book.held_by(some) == len({id(cell) for each in some for cell in plain[each]})


def test_a_fork_takes_no_cells_until_it_grows() -> None:
    book = CellBook()
    book.append(0, 600)
    book.fork(0, 1, 600)
    book.append(1, 20)
    assert (book.used, book.held(1)) == (620, 620)
    book.drop(0)
    assert (book.used, book.held(0), book.held(1)) == (620, 0, 620)
    book.drop(1)
    assert book.used == 0


def test_growing_behind_a_shared_end_does_not_grow_the_other() -> None:
    book = CellBook()
    book.append(0, 10)
    book.fork(0, 1, 4)
    book.append(0, 1)
    book.append(1, 2)
    assert (book.held(0), book.held(1), book.used) == (11, 6, 13)


def test_what_cannot_be_is_refused() -> None:
    book = CellBook()
    book.append(0, 3)
    book.append(1, 3)
    with pytest.raises(AssertionError):
        book.fork(0, 1, 2)
    with pytest.raises(AssertionError):
        book.fork(0, 2, 4)


def test_check_notices_a_lost_cell() -> None:
    book = CellBook()
    book.append(0, 3)
    book.used = 2
    with pytest.raises(AssertionError):
        book.check()
