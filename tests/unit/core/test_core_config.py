"""What an opsin.toml may be, which names are accepted without effect, and limits that stand in one place."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from opsin.core.config import Config, read_config
from opsin.core.errors import BadParameter
from opsin.core.request import SamplingParams
from opsin.core.settings import MAX_STOP, RENAMED, RETIRED, EngineSettings, ServerSettings


def config(folder: Path, environ: dict[str, str] | None = None, **flags: Any) -> Config:
    return read_config(flags, {"XDG_CONFIG_HOME": str(folder / "xdg"), **(environ or {})}, folder)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "opsin.toml").write_bytes(b"\xef\xbb\xbfparallel = 3\n")
    assert config(tmp_path).settings.parallel == 3


def test_a_folder_a_pipe_and_links_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "opsin.toml"

    def refused() -> str:
        with pytest.raises(BadParameter) as caught:
            config(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
        return str(caught.value)

    path.mkdir()
    assert "is a folder" in refused()
    os.mkfifo(path)
    assert "not a regular file" in refused()
    path.symlink_to(path)
    assert "cannot be read" in refused()
    path.symlink_to(tmp_path / "nowhere")
    assert "cannot be read" in refused()
    path.write_bytes(b"a = '\xff'")
    assert "not text in UTF-8" in refused()
    path.write_bytes(b"#" * (2**20 + 1))
    assert "is larger than" in refused()
    path.write_text("parallel = " + "[" * 5000)
    assert "opsin.toml cannot be read" in refused()


def test_the_current_folder_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opsin.core.config import current_folder

    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert read_config({}, {"XDG_CONFIG_HOME": os.devnull}, current_folder()).settings == ServerSettings()


@pytest.mark.parametrize("how", ["flag", "environment", "file"])
def test_renamed_settings_keep_working_with_a_warning_that_names_the_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "none")}
    flags: dict[str, object] = {}
    for old in RENAMED:
        if how == "flag":
            flags[old] = "77"
        elif how == "environment":
            environ[f"OPSIN_{old.upper()}"] = "77"
    if how == "file":
        (tmp_path / "opsin.toml").write_text("".join(f"{old} = 77\n" for old in RENAMED))
    settings = read_config(flags, environ, tmp_path).settings
    for old, new in RENAMED.items():
        assert getattr(settings, new) == 77
        assert f"{old} (" in caplog.text
        assert f"is called {new} now" in caplog.text


def test_retired_settings_are_accepted_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.gguf").write_bytes(b"a")
    (tmp_path / "opsin.toml").write_text(
        f'slice_seconds = 0.5\nprofile = "throughput"\n[tuned]\nmodel = "{tmp_path}/a.gguf"\nprefill_rows = 96\n'
        "threads = 3\n"
    )
    with caplog.at_level(logging.WARNING):
        found = config(tmp_path, {"OPSIN_TURN_SHARE": "0.1"}, longest_turn=0.5)
    assert found.settings.threads == 3
    assert len(caplog.records) == 1
    assert all(name in caplog.text for name in RETIRED)
    assert "environment OPSIN_TURN_SHARE" in caplog.text
    assert not any(name in ServerSettings.model_fields for name in RETIRED)


def test_the_servers_limits_are_those_of_a_request() -> None:
    """`--max-stop 32` still ended at 16: the limit stood in two places."""
    most = ServerSettings(max_stop=MAX_STOP)
    assert len(SamplingParams(stop=tuple(map(str, range(most.max_stop)))).stop) == MAX_STOP
    with pytest.raises(ValueError, match="at most"):
        SamplingParams(stop=("x",) * (MAX_STOP + 1))
    with pytest.raises(ValueError, match="less than or equal"):
        ServerSettings(max_stop=MAX_STOP + 1)
    with pytest.raises(ValueError, match="at most 1000 characters"):
        SamplingParams(stop=("x" * 1001,))


@pytest.mark.parametrize("ctx", [2**32 + 64, 63])
def test_a_context_that_llama_cpp_cannot_count_is_refused(ctx: int) -> None:
    with pytest.raises(ValueError, match="ctx"):
        EngineSettings(ctx=ctx)
