"""Drafts over HTTP and on the command line: the same answers, and what was drafted is told."""

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serve_process import environment, image_url, question, served

import opsin.models

pytestmark = [pytest.mark.slow, pytest.mark.native]

ROOT = Path(__file__).parents[3]
SHAPES = str(Path(opsin.models.__file__).parent / "demo" / "shapes.png")
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}, "shape": {"enum": ["circle", "star"]}},
    "required": ["color", "shape"],
}
# The demo model's steps are too short to be worth saving.
SLOW_ENOUGH = "import opsin.engine.speculation\nopsin.engine.speculation.FASTEST = 0.0\n"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sitecustomize.py").write_text(SLOW_ENOUGH)
    return {**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}


def test_a_server_says_what_was_drafted_in_timings_and_metrics(env: dict[str, str]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    asked = question(image_url(1), temperature=0, response_format=form)
    with served("--speculation", env=env) as server:
        replies = [httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json() for _ in range(3)]
        metrics = httpx.get(f"{server.url}/metrics").text
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**asked, "stream": True}) as streamed:
            lines = [line.removeprefix("data: ") for line in streamed.iter_lines() if line.startswith("data: {")]
    texts = [reply["choices"][0]["message"]["content"] for reply in replies]
    deltas = [json.loads(line)["choices"] for line in lines]
    texts.append("".join(delta[0]["delta"].get("content") or "" for delta in deltas if delta))
    assert len(set(texts)) == 1
    assert set(json.loads(texts[0])) == {"color", "shape"}
    timings = [reply["timings"] for reply in replies]
    assert timings[2]["draft_n"] >= timings[2]["draft_n_accepted"] > 0
    for name, key in (("draft", "draft_n"), ("accepted", "draft_n_accepted")):
        found = re.search(rf"^opsin:spec_decode_num_{name}_tokens_total ([\d.]+)$", metrics, re.MULTILINE)
        assert found is not None
        assert float(found[1]) >= sum(each[key] for each in timings)


def test_the_command_says_what_was_drafted_in_its_rows(env: dict[str, str], tmp_path: Path) -> None:
    schema = tmp_path / "thing.json"
    schema.write_text(json.dumps(SCHEMA))
    command = [sys.executable, "-m", "opsin", "ask", SHAPES, SHAPES, SHAPES, "--format", "jsonl", "What is this?"]
    command += ["--json-schema", str(schema), "--temperature", "0", "--parallel", "1"]

    def rows(*more: str) -> list[dict[str, dict[str, int]]]:
        done = subprocess.run([*command, *more], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    plain, drafted = rows(), rows("--speculation")
    assert [row["text"] for row in plain] == [row["text"] for row in drafted]
    assert [row["timings"]["draft_n"] for row in plain] == [0, 0, 0]
    assert sum(row["timings"]["draft_n_accepted"] for row in drafted) > 0
