"""Tuning on a real backend: the settings that it sets arrive, its pieces are measured, and changed answers are seen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opsin.bench.measure import Measured
from opsin.cli import tune as command
from opsin.cli.app import app
from opsin.cli.bench import _settings
from opsin.compose import open_runtime
from opsin.core.config import read_config, read_file
from opsin.core.errors import BadInput, BadParameter
from opsin.core.settings import EngineSettings
from opsin.models.synth import write_pair
from opsin.tune import projector
from opsin.tune.pareto import Point
from opsin.tune.projector import convert_projector
from opsin.tune.rig import Pieces, RigTrial, sized, survey
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
    why, told = judge(before, converted, encoder=True)
    # Eight bits of a mantissa are seen, and are near enough.
    assert "largest difference 0.00%" not in told
    assert why is None or "log probabilities" in why
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
    monkeypatch.setattr(projector, "default_folder", lambda: tmp_path / "kept")
    made = convert_projector(pair.mmproj, "q8_0", tmp_path / "made")
    assert made is not None
    kept = tmp_path / "kept" / made.name
    found = report({"mmproj": made, "threads": 1, "threads_batch": 1, "threads_encode": 2})
    monkeypatch.setattr(command, "_measured", lambda *_args, **_more: found)
    # Downloaded models lie behind links of telling names; the files have none.
    for name, path in (("llava.gguf", pair.llm), ("mmproj.gguf", pair.mmproj)):
        Path(name).symlink_to(path)
    arguments = ["tune", "--model", "llava.gguf", "--mmproj", "mmproj.gguf", "--plot", "plot.svg", "--ctx", "4096"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"], catch_exceptions=False)
    assert f'mmproj = "{kept}"' in dry.stdout
    assert not kept.parent.exists()
    assert not Path("opsin.toml").exists()
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "picked for interactive: balanced: one question takes 0.500 of the untuned time" in result.stdout
    assert Path("plot.svg").read_text().startswith("<svg")
    settings = read_config({}, {}, tmp_path).engine()
    assert (settings.mmproj, settings.threads, settings.threads_encode) == (kept, 1, 2)
    table = read_file(Path("opsin.toml"))[1]
    assert (table["model"], table["tuned_from"]) == (str(tmp_path / "llava.gguf"), str(tmp_path / "mmproj.gguf"))
    # What shaped the measurement is said, too.
    assert (table["parallel"], table["ctx"]) == (8, 4096)
    runtime = open_runtime(settings.model, settings.mmproj, settings)
    assert runtime.backend is not None
    assert runtime.backend.threads == (1, 1, 2)
    runtime.close()
    sides = command._sides({}, Path("opsin.toml"))
    assert (sides["untuned"].mmproj, sides["untuned"].threads) == (tmp_path / "mmproj.gguf", None)
    assert (sides["tuned"].mmproj, sides["tuned"].threads) == (kept, 1)
    assert {(side.parallel, side.ctx) for side in sides.values()} == {(8, 4096)}
    # A later tuning in which nothing wins takes the table away.
    monkeypatch.setattr(command, "_measured", lambda *_args, **_more: report({}))
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"], catch_exceptions=False)
    assert "[tuned]" not in dry.stdout
    assert "best that were found" in dry.stderr
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "lost its table" in result.stderr
    assert read_file(Path("opsin.toml")) == ({}, {})


def test_the_file_in_force_is_written_and_a_new_one_is_alone(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuning wrote ./opsin.toml, which hid the user's own settings in that folder from then on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    own = tmp_path / "config" / "opsin" / "opsin.toml"
    own.parent.mkdir(parents=True)
    own.write_text("threads = 3\n")
    seen: list[tuple[EngineSettings, frozenset[str]]] = []
    monkeypatch.setattr(
        command, "_measured", lambda settings, wish, _: seen.append((settings, wish.fixed)) or report({"ubatch": 256})
    )
    arguments = ["tune", "--model", str(pair.llm), "--mmproj", str(pair.mmproj)]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not Path("opsin.toml").exists()
    assert read_file(own)[1]["ubatch"] == 256
    CliRunner().invoke(app, [*arguments, "--out", "new.toml"], catch_exceptions=False)
    assert read_file(Path("new.toml"))[1]["ubatch"] == 256
    assert [("threads" in fixed, settings.threads) for settings, fixed in seen] == [(True, 3), (False, None)]


def test_two_engines_that_do_not_fit_are_refused(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EngineSettings(model=pair.llm, mmproj=pair.mmproj, ctx=2048, parallel=2)
    command._check_room(settings)
    monkeypatch.setattr("opsin.doctor.room.free_memory", lambda _devices: {"CPU": 2**20})
    with pytest.raises(BadInput, match="Two engines side by side need"):
        command._check_room(settings)


def test_tuning_measures_the_layout_that_is_used(pair: Any) -> None:
    settings = EngineSettings(model=pair.llm, mmproj=pair.mmproj, parallel=2, ctx=2048)
    found = sized(command._open, settings, gpus=True)
    assert (found.settings.ctx, found.settings.gpu_layers, found.limits.shared) == (2048, 0, False)
    assert found.image_tokens > 0


def test_a_check_that_counts_for_nothing_says_why_and_fails(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("opsin.toml").write_text(f'[tuned]\nmodel = "{pair.llm}"\nmmproj = "{pair.mmproj}"\nthreads = 1\n')

    def void(drivers: Any, workload: Any, **_: Any) -> dict[str, Measured]:
        return {name: Measured(workload, (), (), "an answer had no text") for name in drivers}

    monkeypatch.setattr("opsin.bench.measure_in_turn", void)
    result = CliRunner().invoke(app, ["tune", "--check", "--parallel", "2", "--ctx", "2048"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "counts for nothing, since an answer had no text (untuned)" in result.stdout


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
