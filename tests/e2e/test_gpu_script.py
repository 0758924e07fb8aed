"""scripts/gpu_proof.sh: wrong options are told, and steps that fail are not taken for a proof."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_proof.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((), "name a folder"), (("--cuda", "x"), "no option --cuda"), (("--work",), "--work wants a value")],
)
def test_wrong_options_are_told(arguments: tuple[str, ...], told: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


def test_nothing_is_proved_where_nothing_runs(tmp_path: Path) -> None:
    done = run("--cpu", "--python", "/bin/false", "--work", str(tmp_path / "work"), str(tmp_path / "results"))
    assert done.returncode == 1
    rows = [line.split("\t") for line in (tmp_path / "results" / "steps.tsv").read_text().splitlines()[1:]]
    ended = {name: (code, expected) for name, code, expected, _ in rows}
    assert ended["synth"] == ended["encoder_placed"] == ("1", "0")
    assert "synth ended with 1, not 0" in done.stderr
