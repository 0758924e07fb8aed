"""`opsin tune` as a user types it, and the commands that read what it wrote; on a pair of random weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opsin.core.config import read_file
from opsin.models import Pair
from synth import write_pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("pair"))


@pytest.fixture
def opsin(opsin_env: dict[str, str], tmp_path: Path) -> Any:
    env = {**opsin_env, "XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_CONFIG_HOME": str(tmp_path / "config")}

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "opsin", *map(str, arguments)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def tuned(folder: Path, pair: Pair, **settings: Any) -> Path:
    path = folder / "opsin.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    head = [f'model = "{pair.llm}"', f'mmproj = "{pair.mmproj}"']
    path.write_text("\n".join(["picture_cache_bytes = 1000000", "[tuned]", *head, *lines, ""]))
    return path


def test_it_measures_keeps_to_the_time_and_tells_what_it_tried(opsin: Any, pair: Pair, tmp_path: Path) -> None:
    plot, document = tmp_path / "plot.svg", tmp_path / "tune.json"
    (tmp_path / "opsin.toml").write_text("# mine\nthreads = 1\n")
    command = ("tune", "--model", pair.llm, "--mmproj", pair.mmproj, "--minutes", "0.5", "--parallel", "2")
    command += ("--ctx", "4096")
    done = opsin(*command, "--plot", plot, "--json-out", document)
    report = json.loads(document.read_text())
    assert report["seconds"] < 120
    assert "measuring the untuned settings" in done.stderr
    assert f"picked for interactive: {report['picked']}" in done.stdout
    assert plot.read_text().count("<circle") == len(report["points"])
    dimensions = {tried["dimension"] for tried in report["tried"]}
    assert "flash attention" in dimensions
    assert "threads of decode" not in dimensions  # the file says them
    own, table = read_file(tmp_path / "opsin.toml")
    assert own == {"threads": 1}
    assert (tmp_path / "opsin.toml").read_text().startswith("# mine\n")
    assert bool(table) == bool(report["settings"])
    if table:
        assert table["model"] == str(pair.llm)
        assert table["parallel"] == 2


def test_a_dry_run_writes_nothing(opsin: Any, pair: Pair, tmp_path: Path) -> None:
    done = opsin("tune", "--model", pair.llm, "--mmproj", pair.mmproj, "--minutes", "0.5", "--ctx", "4096", "--dry-run")
    assert f"writing {pair.mmproj.name} as q8_0" in done.stderr
    picked_nothing = "picked for interactive: untuned" in done.stdout
    assert ("[tuned]" in done.stdout) != picked_nothing
    assert (f'model = "{pair.llm}"' in done.stdout) != picked_nothing
    assert not (tmp_path / "opsin.toml").exists()
    # Nor are conversions left behind, tried or picked.
    assert list((tmp_path / "cache").rglob("*.gguf")) == []


def test_the_check_measures_both_sides_in_turn(opsin: Any, pair: Pair, tmp_path: Path) -> None:
    path = tuned(tmp_path, pair, threads=1, threads_batch=1)
    done = opsin(
        "tune", "--check", "--runs", "2", "--ctx", "1024", "--parallel", "2", "--json-out", tmp_path / "check.json"
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads((tmp_path / "check.json").read_text())
    assert document["settings"]["tuned"]["threads"] == 1
    assert "threads" not in document["settings"]["untuned"]
    for name in ("W1", "W4"):
        row = document["workloads"][name]
        assert row["void"] is None
        assert len(row["tuned_s"]) == len(row["untuned_s"]) == 2
        assert row["ratio"] > 0
        assert f"{name}, " in done.stdout
    path.write_text("threads = 1\n")
    refused = opsin("tune", "--check", code=2)
    assert "holds nothing that was tuned" in refused.stderr


def test_ask_and_bench_read_what_was_written(opsin: Any, pair: Pair, tmp_path: Path) -> None:
    picture = Path(__file__).parents[2] / "src" / "opsin" / "models" / "demo" / "shapes.png"
    # A limit on image tokens below what the model has shows that the file was read.
    tuned(tmp_path, pair, ctx=1024, device="nowhere")
    asked = ("ask", picture, "What is it?", "--json", "--max-tokens", "2")
    assert "nowhere" in opsin(*asked, code=2).stderr
    row = json.loads(opsin(*asked, "--device", "none").stdout)
    assert row["model"]["llm_file"] == pair.llm.name
    # Another model gets nothing of it.
    assert json.loads(opsin(*asked, "--model", "demo").stdout)["model"]["llm_file"] == "opsin-demo.gguf"
    bench = ("bench", "engine", "--workloads", "W1", "--no-batched", "--runs", "1", "--threads", "1")
    last = opsin(*bench, "--device", "none").stdout.splitlines()[-1]
    assert json.loads(last)["settings"]["n_ctx"] == 1024


def test_bad_input_is_one_sentence(opsin: Any, pair: Pair, tmp_path: Path) -> None:
    here = ("tune", "--model", pair.llm, "--mmproj", pair.mmproj)
    assert "--profile is interactive or throughput" in opsin(*here, "--profile", "fast", code=2).stderr
    foreign = tmp_path / "opsin.toml"
    foreign.write_text("[project]\n")
    assert "--force" in opsin(*here, "--out", foreign, code=2).stderr
    assert foreign.read_text() == "[project]\n"
