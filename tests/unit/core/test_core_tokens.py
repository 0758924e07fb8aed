"""Positions of image chunks: counted up, or by time, height and width."""

import numpy as np

from opsin.cache import Prefix, units_of
from opsin.core.request import Chunk, ImageChunk, TextChunk

GRID = np.array([[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]], np.int32)
PLAIN = ImageChunk("a", 0, n_tokens=4, n_pos=4)
ROPE = ImageChunk("b", 0, n_tokens=4, n_pos=2, positions=GRID)


def test_plain_positions_count_up_from_the_first() -> None:
    np.testing.assert_array_equal(PLAIN.positions_at(10, 1, 4), [[11, 12, 13]])
    assert PLAIN.last_pos == 3


def test_positions_of_a_grid_go_section_by_section() -> None:
    given = ROPE.positions_at(10, 1, 4)
    np.testing.assert_array_equal(given, [[10, 10, 10], [10, 11, 11], [11, 10, 11], [10, 10, 10]])
    assert given.dtype == np.int32
    assert given.flags.c_contiguous
    assert ROPE.last_pos == 0


def test_only_what_moves_moves() -> None:
    """HunyuanVL counts rows and columns from the image's corner, and its fourth number is the image's."""
    moves = np.zeros_like(GRID)
    moves[:, 0] = 1
    run = ImageChunk("c", 0, n_tokens=4, n_pos=4, positions=GRID, moves=moves)
    np.testing.assert_array_equal(run.positions_at(10, 0, 4), [[10] * 4, [0, 0, 1, 1], [0, 1, 0, 1], [0] * 4])


def test_the_memory_ends_where_the_last_cell_is() -> None:
    def last(*chunks: Chunk) -> int:
        prefix = Prefix(units_of(chunks, "salt"))
        prefix.ready = len(prefix.units)
        return prefix.last_position

    text = TextChunk((1, 2, 3))
    assert last() == -1
    assert last(text) == 2
    assert last(text, PLAIN) == 6
    assert last(text, ROPE) == 3
    assert last(text, ROPE, TextChunk((4,))) == 5
