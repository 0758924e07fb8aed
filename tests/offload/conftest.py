"""A second device made of software: Mesa's llvmpipe, which llama.cpp takes for a GPU named Vulkan0.

`make test-offload` builds llama.cpp with Vulkan (setup.sh) and runs this folder there; elsewhere it is skipped.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
BUILT = ".venv-offload"
ROWS: list[tuple[str, ...]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    elsewhere = pytest.mark.skip(reason="needs llama.cpp with Vulkan: run `make test-offload`")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.native)
            if Path(sys.prefix).name != BUILT:
                item.add_marker(elsewhere)


def pytest_configure() -> None:
    # Without it llama.cpp leaves Vulkan devices out that are made of software.
    os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was proved, for docs/log.md."""
    if not ROWS:
        return
    terminalreporter.section("where it ran")
    header = ("setup", "part", "backend", "nodes", "of ops", "of time", "splits", "ops there")
    for row in (header, ("---",) * len(header), *ROWS):
        terminalreporter.write_line("| " + " | ".join(row) + " |")


def _tell(setup: str, placement: Any) -> None:
    for part, shares in (("encoder", placement.encoder), ("language model", placement.language_model)):
        most = max(shares, key=lambda name: shares[name].nodes)
        for name, share in shares.items():
            ops = ", ".join(f"{count} {op}" for op, count in share.ops.items()) if name != most else "all others"
            if len(shares) == 1:
                ops = "all"
            row = (f"{share.nodes}", f"{share.share_of_ops:.1%}", f"{share.share_of_time:.1%}", f"{share.splits}")
            ROWS.append((setup, part, name, *row, ops))
        setup = ""


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from synth import write_pair

    return write_pair("tiny", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def odd_pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Heads of 12 values in the encoder: Vulkan's flash attention takes multiples of 8 only."""
    from dataclasses import replace

    from synth import SHAPES, write_shape

    tiny = SHAPES["tiny"]
    vision = replace(tiny.vision, width=60, layers=4, heads=5)
    return write_shape(replace(tiny, name="odd-heads", vision=vision), tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="session")
def opened() -> Callable[..., Any]:
    """A backend on a pair, with the settings given."""
    from opsin.core.settings import EngineSettings
    from opsin.native import open_backend

    def open_pair(pair: Any, **settings: Any) -> Any:
        wanted = {"model": pair.llm, "mmproj": pair.mmproj, "ctx": 512, "ubatch": 64, **settings}
        return open_backend(EngineSettings(**wanted))

    return open_pair


@pytest.fixture(scope="session")
def prove(opened: Callable[..., Any]) -> Callable[..., Any]:
    """The placement of a pair under some settings; a line of the table, too."""

    def proved(setup: str, pair: Any, **settings: Any) -> Any:
        backend = opened(pair, **settings)
        try:
            placement = backend.placement()
        finally:
            backend.close()
        _tell(setup, placement)
        return placement

    return proved
