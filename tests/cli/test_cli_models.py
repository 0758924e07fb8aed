"""`opsin pull` and `opsin models` as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SYNTH = Path(__file__).parents[2] / "tools" / "synth.py"


@pytest.fixture
def run(tmp_path: Path, opsin_env: dict[str, str]):
    environment = {
        **opsin_env,
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        program = [str(SYNTH)] if arguments[0] == "synth" else ["-m", "opsin", str(arguments[0])]
        command = [sys.executable, *program, *map(str, arguments[1:])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done

    return run


def test_synth_models_and_use_play_together(run, tmp_path: Path):
    written = run("synth", "--shape", "tiny", "-o", tmp_path, "--type", "q4_0", "--seed", 7).stdout
    llm = tmp_path / "tiny-q4_0.gguf"
    assert f"{llm}  0." in written
    assert "mmproj-tiny-f16.gguf" in written
    assert f"{tmp_path.name} is the default model now" in run("models", "use", tmp_path).stdout
    default = [model for model in json.loads(run("models", "--json").stdout) if model["is_default"]]
    assert [model["llm_file"] for model in default] == [str(llm)]
    assert default[0]["quantisation"] == "Q4_0"
    table = run("models").stdout.splitlines()
    assert next(line for line in table if line.startswith("* ")).split()[-1] == str(llm)


def test_a_folder_is_listed_on_request(run, tmp_path: Path):
    run("synth", "--shape", "tiny", "-o", tmp_path)
    assert str(tmp_path / "tiny-q8_0.gguf") not in run("models").stdout
    assert str(tmp_path / "tiny-q8_0.gguf") in run("models", "--folder", tmp_path).stdout


def test_known_names_are_listed(run):
    table, last = run("models", "--known").stdout.rstrip().rsplit("\n", 1)
    lines = table.splitlines()
    assert lines[0].split() == ["name", "download", "memory", "licence", "repo"]
    llava = next(line for line in lines if "llava-1.5-7b" in line)
    assert re.search(r"llava-1\.5-7b +4\.\d GB +\d\.\d GB +Llama 2 +second-state/", llava)
    assert "Sizes are estimates" in last
    rows = json.loads(run("models", "--known", "--json").stdout)
    assert {"name", "title", "repo", "licence", "parameters", "download_bytes", "memory_bytes"} <= rows[0].keys()
    chosen = [row["name"] for row in rows if row["first_choice"]]
    assert len(chosen) <= 1  # none on a machine with very little memory
    assert [line.split()[1] for line in lines if line.startswith("*")] == chosen
    assert all(f"* {name} is a good first choice" in last for name in chosen)


def test_sizes_and_licence_are_told_before_a_download(run):
    first, second = run("pull", "LLaVA", code=3).stderr.splitlines()
    assert re.match(r"LLaVA-1\.5 7B: about 4\.\d GB to download and \d\.\d GB of memory .*; licence Llama 2", first)
    assert "http://127.0.0.1:9 cannot be reached" in second


def test_a_model_that_cannot_see_is_no_default(run, tmp_path: Path):
    run("synth", "--shape", "tiny", "-o", tmp_path)
    (tmp_path / "mmproj-tiny-f16.gguf").unlink()
    assert "has no projector beside it" in run("models", "use", tmp_path, code=3).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["pull", "nothing-like-it"], 3, "did you mean"),
        (["models", "use", "llava"], 3, "opsin pull llava-1.5-7b"),
    ],
)
def test_what_goes_wrong_is_one_sentence(run, arguments: list[str], code: int, says: str):
    done = run(*arguments, code=code)
    assert done.stdout == ""
    assert done.stderr.startswith("opsin: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
