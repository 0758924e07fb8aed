"""A small real language model without a projector."""

from collections.abc import Iterator

import pytest
from real_model import smollm2_file

from opsin import Opsin


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Opsin]:
    with Opsin(smollm2_file(), config=False, parallel=8, ctx=8192, threads=1, disk_cache=False) as opsin:
        yield opsin
