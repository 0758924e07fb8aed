"""Programs of other people's clients, each in an environment of its own that `make test-clients` makes."""

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


@pytest.mark.skipif(not MODULES.exists(), reason="make test-clients installs them")
@pytest.mark.parametrize("program", sorted(PROGRAMS.glob("*_client.mjs")), ids=lambda path: path.stem)
def test_a_javascript_client(program: Path, server: Any) -> None:
    copied = MODULES.parent / program.name  # node looks for packages beside the program
    for path in (program, PROGRAMS / "asked.mjs"):
        (MODULES.parent / path.name).write_bytes(path.read_bytes())
    run(["node", str(copied)], server)


def run(command: list[str], server: Any) -> None:
    done = subprocess.run([*command, server.v1, str(IMAGE)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
