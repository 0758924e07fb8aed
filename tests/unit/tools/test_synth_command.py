"""`tools/synth.py` as a script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tools" / "synth.py"

pytestmark = pytest.mark.slow  # each starts Python


def run(*command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_the_script_writes_a_pair_and_overwrites_only_when_forced(tmp_path: Path):
    command = (SCRIPT, "--shape", "tiny", "--type", "q4_0", "--mmproj-type", "q8_0", "--out", tmp_path)
    written = run(*command).stdout
    llm = tmp_path / "tiny-q4_0.gguf"
    assert f"{llm}  0." in written
    assert str(tmp_path / "mmproj-tiny-q8_0.gguf") in written
    refused = run(*command, code=2)
    assert refused.stdout == ""
    assert refused.stderr == f"synth: {llm} is there already: use --force to write it again, or choose another folder\n"
    run(*command, "--force")


def test_wrong_shapes_and_types_are_one_sentence(tmp_path: Path):
    assert run(SCRIPT, "--shape", "huge", "--out", tmp_path, code=2).stderr.startswith(
        "synth: there is no shape 'huge'"
    )
    assert "choose one of f16, bf16" in run(SCRIPT, "--type", "q3_k", "--out", tmp_path, code=2).stderr
