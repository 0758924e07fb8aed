"""scripts/gpu/measure.sh and scripts/llama.sh: wrong options are refused, failed steps are no proof."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"


def run(*arguments: object, script: str = "measure.sh", limit: float = 60) -> subprocess.CompletedProcess[str]:
    command = ["bash", SCRIPTS / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)


def steps(results: Path) -> dict[str, tuple[str, str]]:
    """Exit code and expected one of each step."""
    rows = [line.split("\t") for line in (results / "steps.tsv").read_text().splitlines()[1:]]
    return {name: (code, expected) for name, code, expected, _ in rows}


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("measure.sh", (), "name a folder"),
        ("measure.sh", ("--cuda", "x"), "no option --cuda"),
        ("measure.sh", ("--work",), "--work needs a value"),
        ("measure.sh", ("results", "nothing"), "no step nothing: choose from machine"),
        ("measure.sh", ("--python", "/nowhere/python", "results"), "no such Python"),
        ("../llama.sh", (), "name a Python and a backend"),
        ("../llama.sh", ("/nowhere/python", "cuda"), "there is no Python /nowhere/python"),
        ("../llama.sh", ("/bin/sh", "opencl"), "there is no backend opencl"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, script: str, arguments: tuple[str, ...], told: str) -> None:
    done = run(*(str(tmp_path / a) if a == "results" else a for a in arguments), script=script)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


def test_nothing_is_proved_where_nothing_runs(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = run("--python", "/bin/false", "--work", tmp_path / "work", "--shape", "tiny", results)
    assert done.returncode == 1
    ended = steps(results)
    assert ended["synth"] == ended["placed"] == ended["bench"] == ("1", "0")
    assert "synth ended with 1, not 0" in done.stderr


@pytest.mark.slow
def test_steps_run_one_by_one_and_write_their_results_as_they_come(tmp_path: Path) -> None:
    results = tmp_path / "results"
    options = ("--python", sys.executable, "--work", tmp_path / "work", "--shape", "tiny", results)
    for names in (("machine", "synth"), ("ask",), ("doctor", "placed"), ("bench",)):
        done = run(*options, *names, limit=280)
        assert done.returncode == 0, done.stderr
        assert set(names) <= set(steps(results))
    assert list(steps(results)) == ["machine", "synth", "ask", "doctor", "placed", "bench"]
    assert json.loads((results / "ask.out").read_text())["usage"]["completion_tokens"] == 54
    assert json.loads((results / "bench.json").read_text())["workloads"]["W1"]["invalid"] is None


@pytest.mark.slow
def test_a_rehearsal_without_a_gpu_runs_every_step_and_leaves_all_files(tmp_path: Path) -> None:
    results, began = tmp_path / "results", time.monotonic()
    done = run("--python", sys.executable, "--work", tmp_path / "work", "--shape", "tiny", results, limit=290)
    assert done.returncode == 0, done.stderr
    taken = steps(results)
    assert set(taken) == {
        *("machine", "synth", "ask", "ask_again", "quick", "doctor", "placed", "bench", "questions", "long", "many"),
        *("captions", "overhead", "tune", "predict"),
    }
    for name in ("bench", "questions", "long", "overhead", "batched-1", "batched-8", "captions", "tune", "predict"):
        assert json.loads((results / f"{name}.json").read_text())
    print(f"{time.monotonic() - began:.0f} s")
