"""Tuning on a real backend: the settings that it sets arrive, its pieces are measured, and changed answers are seen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opsin.cli import tune as command
from opsin.cli.app import app
from opsin.cli.bench import _settings
from opsin.compose import open_runtime
from opsin.core.config import read_config, read_file
from opsin.core.errors import BadParameter
from opsin.core.settings import EngineSettings
from opsin.models.synth import write_pair
from opsin.tune.pareto import Point
from opsin.tune.projector import convert_projector
from opsin.tune.rig import Pieces, RigTrial, survey
from opsin.tune.search import Ratio, Tried
from opsin.tune.session import Report
from opsin.tune.tolerance import judge, reference


def rig(pair: Any, **settings: Any) -> Any:
    wanted = {"model": pair.llm, "mmproj": pair.mmproj, "ctx": 2048, "parallel": 2, "threads": 1, "disk_cache": False}
    return command._open(EngineSettings(**{**wanted, **settings}))


@pytest.fixture(scope="module")
def untuned(pair: Any) -> Iterator[Any]:
    opened = rig(pair)
    yield opened
    opened.close()


def test_settings_that_are_tuned_reach_the_library(pair: Any) -> None:
    one = rig(pair, threads_batch=2, threads_encode=3, prefill_rows=64)
    assert one.threads == (1, 2, 3)
    assert one.engine.limits.best_rows == 64
    one.close()
    other = rig(pair, threads=2, vision_flash_attention=False, flash_attention=True, longest_turn=0.5, slice_seconds=1)
    # The encoder takes the threads of decode where nobody says anything else.
    assert other.threads == (2, 2, 2)
    assert other.engine.limits.best_rows == 192
    policy = other.engine._policy
    assert (policy.longest_turn, policy.slice_seconds, policy.turn_share) == (0.5, 1, 0.05)
    other.close()


def test_pieces_are_measured_and_only_the_tuned_part_differs(untuned: Any) -> None:
    pieces, noise = survey(untuned, 2, rounds=2)
    assert 0.03 <= noise <= 0.25
    assert min(pieces.encode, pieces.prefill, pieces.step, pieces.batched) > 0
    assert pieces.prefill > pieces.step
    trial = RigTrial(untuned, "encode", 2, Pieces(0.0, 100.0, 1.0, 1.0))
    assert 132 < trial.run().latency < 133
    trial = RigTrial(untuned, "language", 2, Pieces(100.0, 0.0, 0.0, 0.0))
    encodes = untuned.engine.stats.encodes
    assert 100 < trial.run().batch < 110
    assert untuned.engine.stats.encodes == encodes  # the picture was known


def test_the_same_settings_change_nothing_and_another_projector_does(pair: Any, untuned: Any, tmp_path: Path) -> None:
    before = reference(untuned)
    assert len(before.embeddings) == len(before.answers) == 3
    why, told = judge(before, untuned, encoder=True)
    assert why is None
    assert "cosine 1.00000" in told
    assert "at most 0.000" in told
    converted = rig(pair, mmproj=convert_projector(pair.mmproj, "bf16", tmp_path))
    _, told = judge(before, converted, encoder=True)
    assert "cosine 0.99" in told or "cosine 1.0" in told
    assert "at most 0.000" not in told or "cosine 1.00000" not in told
    converted.close()
    stranger = rig(pair, mmproj=write_pair("tiny", tmp_path, seed=9).mmproj)
    why, _ = judge(before, stranger, encoder=True)
    assert why is not None
    assert "too far" in why
    stranger.close()


def report(settings: dict[str, Any]) -> Report:
    points = (Point("untuned", 2.0, 1.0), Point("balanced", 1.0, 2.0, Ratio(0.5, 0.01), Ratio(0.5, 0.02), settings))
    tried = (Tried("KV memory", {"kv_type": "q8_0"}, "refused: too far"),)
    picked = points[1] if settings else points[0]
    return Report("interactive", Pieces(1, 1, 1, 1), 0.05, tried, points, picked, 9.0, settings, "near")


def test_what_was_picked_is_written_and_read_back(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = convert_projector(pair.mmproj, "q8_0", tmp_path / "made")
    found = report({"mmproj": made, "threads": 1, "threads_batch": 1, "threads_encode": 2})
    monkeypatch.setattr(command, "_measured", lambda *_args, **_more: found)
    arguments = ["tune", "--model", str(pair.llm), "--mmproj", str(pair.mmproj), "--plot", "plot.svg"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "picked for interactive: balanced: one question takes 0.500 of the untuned time" in result.stdout
    assert Path("plot.svg").read_text().startswith("<svg")
    settings = read_config({}, {}, tmp_path).engine()
    assert (settings.mmproj, settings.threads, settings.threads_encode) == (made, 1, 2)
    assert read_file(Path("opsin.toml"))[1]["tuned_from"] == str(pair.mmproj.resolve())
    runtime = open_runtime(settings.model, settings.mmproj, settings)
    assert runtime.backend is not None
    assert runtime.backend.threads == (1, 1, 2)
    runtime.close()
    sides = command._sides({}, Path("opsin.toml"))
    assert (sides["untuned"].mmproj, sides["untuned"].threads) == (pair.mmproj.resolve(), None)
    assert (sides["tuned"].mmproj, sides["tuned"].threads) == (made, 1)
    # A later tuning in which nothing wins takes the table away.
    monkeypatch.setattr(command, "_measured", lambda *_args, **_more: report({}))
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "lost its table" in result.stderr
    assert read_file(Path("opsin.toml")) == ({}, {})


def test_bench_takes_the_file_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opsin.toml").write_text("threads = 3\nport = 1\n")
    (tmp_path / "other.toml").write_text("threads = 4\nparallel = 2\n")
    assert (_settings({}, None, config=True).threads, _settings({}, None, config=True).parallel) == (3, 8)
    other = _settings({"ctx": 512}, tmp_path / "other.toml", config=True)
    assert (other.threads, other.parallel, other.ctx, other.disk_cache) == (4, 2, 512, False)
    assert _settings({}, None, config=False).threads is None
    with pytest.raises(BadParameter, match="give one of them"):
        _settings({}, tmp_path / "other.toml", config=False)
