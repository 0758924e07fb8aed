"""Tuning on a real backend: settings arrive, answers are timed and compared, and what wins is written and read back."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from opsin.cli import tune as command
from opsin.cli.app import app
from opsin.compose import measured_device, open_runtime
from opsin.core.config import read_config, read_file
from opsin.core.errors import BadParameter
from opsin.core.settings import EngineSettings
from opsin.tune import projector
from opsin.tune.measure import MAX_DRIFT, Candidate, Report, Tuner, candidates
from opsin.tune.projector import convert_projector


def settings_of(pair: Any, **settings: Any) -> EngineSettings:
    wanted = {"model": pair.llm, "mmproj": pair.mmproj, "ctx": 1024, "parallel": 2, "threads": 1, "disk_cache": False}
    return EngineSettings(**{**wanted, **settings})


def opened(settings: EngineSettings) -> Any:
    return open_runtime(settings.model, settings.mmproj, settings)


def threads_of(backend: Any) -> tuple[int, int]:
    """Those that llama.cpp decodes and prefills with."""
    llama = backend.model.lib.llama
    return llama.llama_n_threads(backend.handle.pointer), llama.llama_n_threads_batch(backend.handle.pointer)


def test_settings_that_are_tuned_reach_the_library(pair: Any) -> None:
    one = opened(settings_of(pair, threads_batch=2, ubatch=512))
    assert threads_of(one.backend) == (1, 2)
    assert one.engine.limits.n_ubatch == 512
    one.close()


def test_candidates_are_timed_and_their_answers_compared(pair: Any, tmp_path: Path) -> None:
    made = convert_projector(pair.mmproj, "q8_0", tmp_path)
    assert made is not None
    settings = settings_of(pair)
    tried = [Candidate({"mmproj": made}), Candidate({"ubatch": 512}), Candidate({"device": "nowhere"})]
    report = Tuner(opened, settings, "throughput", minutes=2).run(tried)
    assert report.at_once == 2
    other_type, ubatch, nowhere = report.candidates[:3]
    assert min(report.baseline) > 0
    assert ubatch.drift <= MAX_DRIFT  # the order of sums differs, and how much that moves depends on the CPU
    # Eight bits are seen.
    assert other_type.drift > 0
    assert "not possible" in nowhere.verdict
    assert "nowhere" in nowhere.verdict


def report(changes: dict[str, Any] | None) -> Report:
    best = None if changes is None else Candidate(changes, [0.5] * 3, 0.0, "faster")
    return Report("interactive", 1, (1.0, 1.0), 0.01, () if best is None else (best,), best, 9.0)


def test_what_won_is_written_and_read_back(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (projector, command):
        monkeypatch.setattr(module, "default_folder", lambda: tmp_path / "kept")
    made = convert_projector(pair.mmproj, "q8_0", tmp_path / "made")
    assert made is not None
    kept = tmp_path / "kept" / made.name
    found = report({"mmproj": made, "threads": 1, "threads_batch": 2})
    monkeypatch.setattr(command, "_measured", lambda *_args: found)
    # Downloaded models lie behind links of telling names; the files have none.
    for name, path in (("llava.gguf", pair.llm), ("mmproj.gguf", pair.mmproj)):
        Path(name).symlink_to(path)
    arguments = ["tune", "--model", "llava.gguf", "--mmproj", "mmproj.gguf", "--json-out", "t.json", "--ctx", "4096"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"], catch_exceptions=False)
    assert f'mmproj = "{kept}"' in dry.stdout
    assert not kept.parent.exists()
    assert not Path("opsin.toml").exists()
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "recommended for interactive:" in result.stdout
    assert json.loads(Path("t.json").read_text())["recommended"]["threads_batch"] == 2
    settings = read_config({}, {}, tmp_path).engine()
    assert (settings.mmproj, settings.threads, settings.threads_batch) == (kept, 1, 2)
    table = read_file(Path("opsin.toml"))[1]
    assert (table["model"], table["tuned_from"]) == (str(tmp_path / "llava.gguf"), str(tmp_path / "mmproj.gguf"))
    # What shaped the measurement is said, too.
    assert (table["parallel"], table["ctx"]) == (8, 4096)
    runtime = opened(settings)
    assert runtime.backend is not None
    assert threads_of(runtime.backend) == (1, 2)
    runtime.close()
    # A later tuning in which nothing wins takes the table away.
    monkeypatch.setattr(command, "_measured", lambda *_args: report(None))
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"], catch_exceptions=False)
    assert "[tuned]" not in dry.stdout
    assert "recommended for" in dry.stdout
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "[tuned] was removed" in result.stderr
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
    seen: list[tuple[set[str], int | None]] = []
    monkeypatch.setattr(
        command,
        "_measured",
        lambda settings, fixed, *_: seen.append((fixed, settings.threads)) or report({"ubatch": 256}),
    )
    arguments = ["tune", "--model", str(pair.llm), "--mmproj", str(pair.mmproj)]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not Path("opsin.toml").exists()
    assert read_file(own)[1]["ubatch"] == 256
    CliRunner().invoke(app, [*arguments, "--out", "new.toml"], catch_exceptions=False)
    assert read_file(Path("new.toml"))[1]["ubatch"] == 256
    assert [("threads" in fixed, threads) for fixed, threads in seen] == [(True, 3), (False, None)]


def test_projectors_of_other_types_are_tried_unless_none_can_be_made(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def tune_nothing(self: Tuner, rows: list[Candidate]) -> Report:
        seen[:] = [row.changes["mmproj"].name[-9:] for row in rows if "mmproj" in row.changes]
        return report(None)

    monkeypatch.setattr(Tuner, "run", tune_nothing)
    command._measured(settings_of(pair), {"threads"}, "interactive", tmp_path / "made", 1)
    assert seen == ["q8_0.gguf", "bf16.gguf"]
    (tmp_path / "file").write_text("")
    command._measured(settings_of(pair), set(), "interactive", tmp_path / "file" / "made", 1)
    assert seen == []
    assert not any("mmproj" in row.changes for row in candidates(settings_of(pair), (), 2))


def test_this_machine_is_a_device_with_rates() -> None:
    device, rate = measured_device()
    assert isinstance(device.description, str)
    assert rate.bytes_s > 1e8
    assert rate.ops_s > 5e8
    assert device.memory_total > 2**28


def test_nothing_is_measured_where_the_file_may_not_be_written(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_measured", lambda *_: pytest.fail("minutes were spent"))
    foreign = tmp_path / "foreign.toml"
    foreign.write_text("[project]\n")
    result = CliRunner().invoke(
        app, ["tune", "--model", str(pair.llm), "--mmproj", str(pair.mmproj), "--out", str(foreign)]
    )
    assert isinstance(result.exception, BadParameter)
    assert "--force" in str(result.exception)
    text_only = SimpleNamespace(llm=pair.llm, mmproj=None)
    monkeypatch.setattr(command, "resolve", lambda *_: text_only)
    result = CliRunner().invoke(app, ["tune", "--model", str(pair.llm)])
    assert "no vision encoder to tune" in str(result.exception)


def test_bench_takes_the_file_it_is_told_to(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = f'[tuned]\nmodel = "{pair.llm}"\nmmproj = "{pair.mmproj}"\nctx = 2048\n'
    (tmp_path / "opsin.toml").write_text(f"threads = 3\nport = 1\n{tuned}")
    (tmp_path / "other.toml").write_text("threads = 4\nparallel = 2\n")

    def settings(*arguments: str) -> EngineSettings:
        seen: list[EngineSettings] = []

        def open_nothing(_model: Any, _mmproj: Any, settings: EngineSettings, **_: Any) -> None:
            seen.append(settings)
            raise BadParameter("enough.")

        monkeypatch.setattr("opsin.cli.bench.open_runtime", open_nothing)
        command = ["bench", "engine", "--workloads", "W1", "--model", str(pair.llm), "--mmproj", str(pair.mmproj)]
        result = CliRunner().invoke(app, [*command, *arguments])
        if not seen:
            raise AssertionError(result.output, result.exception)
        return seen[0]

    here, other, none = settings(), settings("--settings", "other.toml", "--ctx", "512"), settings("--no-config")
    assert (here.threads, here.parallel, here.ctx, here.disk_cache) == (3, 8, 2048, False)
    assert (other.threads, other.parallel, other.ctx) == (4, 2, 512)
    assert none.threads is None
