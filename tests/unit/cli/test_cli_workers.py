"""How many workers `opsin batch` starts on a CPU when nobody says."""

import pytest

from opsin.cli.batch import workers_on_cpu

GIB = 2**30


@pytest.mark.parametrize(
    ("size", "rows", "cores", "free", "workers"),
    [
        (GIB, 1000, 2, 16 * GIB, 2),
        (GIB, None, 2, 16 * GIB, 2),
        (GIB, 1000, 64, 256 * GIB, 8),
        (GIB, 1000, 4, 9 * GIB, 2),
        (5 * GIB, 1000, 8, 16 * GIB, 1),
        (GIB, 15, 8, 64 * GIB, 1),
        (GIB, 16, 8, 64 * GIB, 2),
        (GIB, 0, 8, 64 * GIB, 1),
        (GIB, 1000, 8, 0, 1),
        (0, 1000, 2, GIB, 2),
    ],
)
def test_each_core_gets_a_worker_where_rows_and_memory_allow(
    size: int, rows: int | None, cores: int, free: int, workers: int
) -> None:
    assert workers_on_cpu(size, rows, cores, free) == workers
