"""The two models that answer: the demo model, and a small real one."""

from collections.abc import Iterator

import pytest
from real_model import smollm2_file

from opsin import Opsin


@pytest.fixture(scope="session")
def demo() -> Iterator[Opsin]:
    with Opsin(config=False, parallel=16, ctx=16_384, threads=1, disk_cache=False) as opsin:
        yield opsin


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Opsin]:
    with Opsin(smollm2_file(), config=False, parallel=16, ctx=16_384, threads=1, disk_cache=False) as opsin:
        yield opsin
