"""A random-weight pair, backends on it, and child processes for what ends a process."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from native_help import Child

from opsin.core.settings import EngineSettings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.native)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from synth import write_pair

    return write_pair("tiny", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def open_pair(pair: Any) -> Callable[..., Any]:
    from opsin.native import open_backend

    def opened(**settings: Any) -> Any:
        wanted = {"model": pair.llm, "mmproj": pair.mmproj, "ctx": 512, "parallel": 4, "ubatch": 64, "threads": 1}
        return open_backend(EngineSettings(**{**wanted, **settings}))

    return opened


@pytest.fixture(scope="session")
def shared(open_pair: Callable[..., Any]) -> Iterator[Any]:
    backend = open_pair()
    yield backend
    backend.close()


@pytest.fixture
def backend(shared: Any) -> Any:
    """The session's backend with an empty memory."""
    for seq_id in range(shared.limits.n_seq_max):
        shared.kv_remove(seq_id, 0, -1)
    return shared


_PRELUDE = """
import sys
from pathlib import Path
sys.path[:0] = [{here!r}, {tests!r}, {tools!r}]
import numpy as np
from native_help import draw, generate, prefill
from token_rows import TokenRow, batch
from opsin.core.request import EmbeddingRows
from opsin.core.request import ImagePart, TextPart
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.native import open_backend
LLM, MMPROJ = Path({llm!r}), Path({mmproj!r})
def opened(**settings):
    wanted = dict(model=LLM, mmproj=MMPROJ, ctx=512, parallel=4, ubatch=64, threads=1)
    return open_backend(EngineSettings(**{{**wanted, **settings}}))
"""


@pytest.fixture
def in_child(pair: Any) -> Callable[[str], Child]:
    """Run code in a process of its own, with the helpers above and `opened(**settings)`."""
    root = Path(__file__).parents[2]
    here = Path(__file__).parent
    folders = {"here": str(here), "tests": str(here.parent), "tools": str(root / "tools")}
    prelude = _PRELUDE.format(**folders, llm=str(pair.llm), mmproj=str(pair.mmproj))
    # Without it ggml starts a debugger to print where it aborts.
    env = {**os.environ, "PYTHONPATH": str(root / "src"), "GGML_NO_BACKTRACE": "1"}

    def run(code: str) -> Child:
        done = subprocess.run(
            [sys.executable, "-c", prelude + code], env=env, capture_output=True, text=True, timeout=120, check=False
        )
        return Child(done.returncode, done.stdout, done.stderr)

    return run
