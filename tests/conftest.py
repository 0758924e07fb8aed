"""What all tests share."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A case that is slow on a busy machine is no failure.
settings.register_profile("opsin", deadline=None)
settings.load_profile("opsin")

# Half an hour of soaking is asked for by name: make soak.
collect_ignore = [] if "SOAK_MINUTES" in os.environ else ["soak"]


def pytest_configure() -> None:
    """A run that a shell began in the background ignores Ctrl-C, and so would all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, nor a server that a whole module uses, reads or writes the data and settings of whoever runs it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE", "DATA", "CONFIG"):
            patch.setenv(f"XDG_{name}_HOME", str(home / name.lower()))
        for name in ("HF_HUB_CACHE", "LLAMA_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_HOME", str(home / "hf"))
        yield


@pytest.fixture
def opsin_env() -> dict[str, str]:
    """The environment of a child process that runs `python -m opsin`."""
    root = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(root / "src")}
