"""Model files that mislead: a projector of another family, names that would steer the terminal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from serve_process import served

from opsin.models import Pair
from synth import write_pair

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def run(env: dict[str, str], folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opsin", *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def pair_of(pair: Pair) -> list[str]:
    return ["--model", str(pair.llm), "--mmproj", str(pair.mmproj)]


@pytest.fixture
def mixed(tiny: Pair, tmp_path: Path) -> list[str]:
    """A LLaVA whose projector is one of Qwen2.5-VL with the same width."""
    assert tiny.mmproj is not None
    old, mmproj = b"Random tiny projector", tmp_path / "mmproj-other.gguf"
    mmproj.write_bytes(tiny.mmproj.read_bytes().replace(old, b"Qwen2.5 VL 3B".ljust(len(old))))
    return ["--model", str(tiny.llm), "--mmproj", str(mmproj)]


def is_warned(lines: list[str]) -> bool:
    return [("Qwen2.5-VL" in line, "llama" in line) for line in lines if "families" in line] == [(True, True)]


def test_a_projector_of_another_family_is_warned_of_by_each_command(
    tiny: Pair, mixed: list[str], image: Path, tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    asked = run(opsin_env, tmp_path, "ask", image, "What?", "--max-tokens", 2, *mixed)
    assert asked.returncode == 0, asked.stderr
    assert is_warned(asked.stderr.splitlines())
    found = {
        check["name"]: check
        for check in json.loads(run(opsin_env, tmp_path, "doctor", "--json", *mixed).stdout)["checks"]
    }
    assert found["pair.width"]["status"] == "warn"
    assert is_warned([found["pair.width"]["message"]])
    with served(*mixed, cwd=tmp_path) as server:
        assert is_warned(server.lines)


def test_a_pair_that_belongs_together_is_not_warned_of(
    tiny: Pair, image: Path, tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    asked = run(opsin_env, tmp_path, "ask", image, "What?", "--max-tokens", 2, *pair_of(tiny))
    assert asked.returncode == 0, asked.stderr
    assert "families" not in asked.stderr


def test_nothing_in_a_file_or_its_name_steers_the_terminal(
    tiny: Pair, image: Path, tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    assert tiny.mmproj is not None
    folder = tmp_path / "models"
    folder.mkdir()
    for name, source, old, new in (
        ("a\x1b]0;x", tiny.llm, b"", b""),
        ("b", tiny.llm, b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0ll\x1b[m"),
        ("mmproj-c", tiny.mmproj, b"\x03\0\0\0\0\0\0\0mlp", b"\x03\0\0\0\0\0\0\0m\x1b["),
        ("d\nopsin: fine", tiny.llm, b"Random tiny", b"Rand\x1b]0;iny"[:11]),
    ):
        data = source.read_bytes().replace(old, new, 1) if old else source.read_bytes()
        (folder / f"{name}.gguf").write_bytes(data)
    shutil.copy(tiny.mmproj, folder / "mmproj-a.gguf")
    said = run(opsin_env, tmp_path, "models", "--folder", folder)
    assert said.returncode == 0, said.stderr
    asked = ("ask", image, "What?", "--max-tokens", 2, "--model")
    for arguments in (
        [*asked, folder / "a\x1b]0;x.gguf"],
        [*asked, folder / "b.gguf"],
        [*asked, tiny.llm, "--mmproj", folder / "mmproj-c.gguf"],
        [*asked, folder / "d\nopsin: fine.gguf", "--json"],
        ["doctor", "--model", folder / "b.gguf", "--mmproj", tiny.mmproj],
    ):
        done = run(opsin_env, tmp_path, *arguments)
        assert done.returncode in {0, 1, 3}, done.stderr
        said.stdout, said.stderr = said.stdout + done.stdout, said.stderr + done.stderr
    assert "\x1b" not in said.stdout
    assert "\x1b" not in said.stderr
    assert not [line for line in said.stderr.splitlines() if line.startswith("opsin: fine")]
