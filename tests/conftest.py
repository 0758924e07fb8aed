"""What all tests share."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

# Half an hour of soaking is asked for by name: make soak.
collect_ignore = [] if "SOAK_MINUTES" in os.environ else ["soak"]


def pytest_configure() -> None:
    """A run that a shell began in the background ignores Ctrl-C, and so would all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the caches and settings of whoever runs it."""
    home = tmp_path_factory.getbasetemp() / "home"
    for name, folder in {"XDG_CACHE_HOME": "cache", "XDG_DATA_HOME": "data", "XDG_CONFIG_HOME": "config"}.items():
        monkeypatch.setenv(name, str(home / folder))
    for name in ("HF_HOME", "HF_HUB_CACHE", "LLAMA_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(home / "hf"))


@pytest.fixture
def opsin_env() -> dict[str, str]:
    """The environment of a child process that runs `python -m opsin`."""
    root = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(root / "src")}
