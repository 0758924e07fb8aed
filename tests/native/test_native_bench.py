"""`opsin bench engine` on a real model: what it prints, and that its last line is one JSON document."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opsin import bench as bench_room
from opsin.bench.ceiling import Machine, measure_machine
from opsin.cli.bench import app
from opsin.core.errors import BadParameter


@pytest.fixture(autouse=True)
def _quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(threads: int) -> Machine:
        return measure_machine(threads, array_bytes=2**20, side=64, repeats=1)

    monkeypatch.setattr(bench_room, "measure_machine", measure)


def bench(pair: Any, *arguments: str) -> str:
    command = ["engine", "--model", str(pair.llm), "--mmproj", str(pair.mmproj), "--threads", "1", *arguments]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_ceiling_first_workloads_then_one_json_document(pair: Any, tmp_path: Path) -> None:
    saved = tmp_path / "bench.json"
    out = bench(pair, "--workloads", "W2", "--runs", "2", "--json-out", str(saved))
    lines = out.splitlines()
    document = json.loads(lines[-1])
    assert json.loads(saved.read_text()) == document
    assert out.index("GB/s") < out.index("W2") < out.index("8 sequences, plain")
    assert "Python" in out
    row = document["workloads"]["W2"]
    assert row["void"] is None
    assert row["completion_tokens"] == [32] * 6
    assert len(row["runs"]) == 2
    # One picture, six questions: only the first answer prefills it.
    assert row["cached_tokens"][0] < row["cached_tokens"][1]
    assert 0 < row["share_of_ceiling"] < 1
    plain, schema = document["batched"]["plain"], document["batched"]["json_schema"]
    assert plain["void"] is None
    assert plain["tokens_s"] < plain["decode_tokens_s"]
    assert schema["sequences"] == 8
    assert document["settings"]["ctx_of_each"] == 1024


def test_a_comparison_of_batches_that_are_left_out_is_refused(pair: Any) -> None:
    with pytest.raises(BadParameter, match="--no-batched"):
        bench(pair, "--no-batched", "--batched-bench", "llama-batched-bench")


def test_flash_attention_of_a_program_that_is_not_named_is_refused(pair: Any) -> None:
    with pytest.raises(BadParameter, match="--batched-bench"):
        bench(pair, "--no-batched-bench-flash")


def test_a_workload_that_does_not_exist_is_refused_before_anything_is_loaded(pair: Any) -> None:
    with pytest.raises(BadParameter, match="W9"):
        bench(pair, "--workloads", "W9")
