"""Other people's clients and load tools, in environments of their own that `make test-clients` makes."""

import contextlib
import os
import signal
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
PROGRAMS = Path(__file__).parent / "programs"
PYTHON, MODULES = ROOT / ".clients" / "venv" / "bin" / "python", ROOT / ".clients" / "node_modules"
IMAGE = Path(str(files("opsin.models"))) / "demo" / "shapes.png"


@pytest.mark.skipif(not PYTHON.exists(), reason="make test-clients installs them")
@pytest.mark.parametrize("program", sorted(PROGRAMS.glob("*_client.py")), ids=lambda path: path.stem)
def test_a_python_client(program: Path, server: Any) -> None:
    run([str(PYTHON), str(program)], server)


@pytest.mark.parametrize("tool", ["aiperf", "guidellm"])
def test_a_load_tool(tool: str, server: Any) -> None:
    python = ROOT / ".clients" / tool / "bin" / "python"
    if not python.exists():
        pytest.skip(f'make test-clients LOAD_TOOLS="{tool}" installs it')
    run([str(python), str(PROGRAMS / f"{tool}_load.py")], server)


@pytest.mark.skipif(not MODULES.exists(), reason="make test-clients installs them")
@pytest.mark.parametrize("program", sorted(PROGRAMS.glob("*_client.mjs")), ids=lambda path: path.stem)
def test_a_javascript_client(program: Path, server: Any) -> None:
    copied = MODULES.parent / program.name  # node looks for packages beside the program
    for path in (program, PROGRAMS / "asked.mjs"):
        (MODULES.parent / path.name).write_bytes(path.read_bytes())
    run(["node", str(copied)], server)


def run(command: list[str], server: Any) -> None:
    process = subprocess.Popen(
        [*command, server.v1, str(IMAGE)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it started and left
    assert process.returncode == 0, errors[-3000:]
