"""`opsin tune` as a user types it, and the commands that read what it wrote; on the demo model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opsin.core.config import read_file
from opsin.models import Pair
from opsin.models.resolve import demo_pair

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A copy of the demo pair under names of its own."""
    shipped = demo_pair()
    assert shipped.mmproj is not None
    llm, mmproj = tmp_path / "model.gguf", tmp_path / "mmproj-model.gguf"
    llm.write_bytes(shipped.llm.read_bytes())
    mmproj.write_bytes(shipped.mmproj.read_bytes())
    return Pair(llm=llm, mmproj=mmproj, name="model")


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


@pytest.mark.parametrize("profile", ["interactive", "throughput"])
def test_it_measures_and_tells_what_it_tried(opsin: Any, pair: Pair, tmp_path: Path, profile: str) -> None:
    document = tmp_path / "tune.json"
    (tmp_path / "opsin.toml").write_text("# mine\nubatch = 512\n")
    command = ("tune", "--model", pair.llm, "--mmproj", pair.mmproj, "--minutes", "0.5", "--parallel", "2")
    done = opsin(*command, "--ctx", "2048", "--profile", profile, "--json-out", document)
    found = json.loads(document.read_text())
    # How long it takes is for the unit tests to say, by a clock that no other program slows down.
    assert found["baseline_seconds"]
    assert found["at_once"] == {"interactive": 1, "throughput": 2}[profile]
    assert "measuring: baseline" in done.stderr
    assert f"recommended for {profile}: " in done.stdout
    tried = [name for row in found["candidates"] for name in row["settings"]]
    assert {"mmproj", "flash_attention"} <= set(tried)
    assert "ubatch" not in tried  # the file says it
    own, table = read_file(tmp_path / "opsin.toml")
    assert own == {"ubatch": 512}
    assert (tmp_path / "opsin.toml").read_text().startswith("# mine\n")
    assert bool(table) == bool(found["recommended"])
    if table:
        assert table["model"] == str(pair.llm)
        assert table["parallel"] == 2


def test_a_dry_run_writes_nothing(opsin: Any, pair: Pair, tmp_path: Path) -> None:
    done = opsin("tune", "--model", pair.llm, "--mmproj", pair.mmproj, "--minutes", "0.1", "--ctx", "4096", "--dry-run")
    assert f"writing {pair.mmproj.name} as q8_0" in done.stderr
    nothing = "keep the settings as they are" in done.stdout
    assert ("[tuned]" in done.stdout) != nothing
    assert not (tmp_path / "opsin.toml").exists()
    # Nor are conversions left behind, tried or picked.
    assert list((tmp_path / "cache").rglob("*.gguf")) == []


def test_ask_reads_what_was_written(opsin: Any, pair: Pair, tmp_path: Path) -> None:
    image = Path(__file__).parents[2] / "src" / "opsin" / "models" / "demo" / "shapes.png"
    head = [f'model = "{pair.llm}"', f'mmproj = "{pair.mmproj}"', "ctx = 1024", 'device = "nowhere"']
    (tmp_path / "opsin.toml").write_text("\n".join(["threads = 1", "[tuned]", *head, ""]))
    # A device that is not there shows that the file was read.
    asked = ("ask", image, "What is it?", "--json", "--max-tokens", "2")
    assert "nowhere" in opsin(*asked, code=2).stderr
    row = json.loads(opsin(*asked, "--device", "none").stdout)
    assert row["model"]["llm_file"] == pair.llm.name
    # Another model gets nothing of it.
    assert json.loads(opsin(*asked, "--model", "demo").stdout)["model"]["llm_file"] == "opsin-demo.gguf"


def test_bad_input_is_one_sentence(opsin: Any, pair: Pair, tmp_path: Path) -> None:
    here = ("tune", "--model", pair.llm, "--mmproj", pair.mmproj)
    assert "'interactive', 'throughput'" in opsin(*here, "--profile", "fast", code=2).stderr
    foreign = tmp_path / "opsin.toml"
    foreign.write_text("[project]\n")
    assert "--force" in opsin(*here, "--out", foreign, code=2).stderr
    assert foreign.read_text() == "[project]\n"


def test_without_flags_it_tunes_the_default_model_and_says_when_there_was_no_time(opsin: Any, tmp_path: Path) -> None:
    done = opsin("tune", "--minutes", "0.1", "--dry-run")  # the demo model
    assert "recommended for" in done.stdout
    document = tmp_path / "tune.json"
    opsin("tune", "--minutes", "0.1", "--dry-run", "--json-out", document)
    found = json.loads(document.read_text())
    assert found["seconds"] < 30
