"""opsin.toml, environment and flags: who wins, what is refused, and what is printed."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opsin.cli.app import app
from opsin.core.config import Config, read_config
from opsin.core.errors import BadParameter
from opsin.core.settings import ServerSettings


def config(folder: Path, text: str | None = None, environ: dict[str, str] | None = None, **flags: Any) -> Config:
    if text is not None:
        (folder / "opsin.toml").write_text(text)
    return read_config(flags, {"XDG_CONFIG_HOME": str(folder / "xdg"), **(environ or {})}, folder)


def test_without_anything_the_defaults_hold_and_serve_runs_eight_at_a_time(tmp_path: Path) -> None:
    found = config(tmp_path)
    assert found.settings == ServerSettings()
    assert found.settings.parallel == 8
    assert set(found.origins.values()) == {"default"}


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    text = 'host = "::1"\nport = 1\nparallel = 2\n'
    found = config(tmp_path, text, {"OPSIN_PORT": "2", "OPSIN_PARALLEL": "3"}, parallel=4)
    assert (found.settings.host, found.settings.port, found.settings.parallel) == ("::1", 2, 4)
    assert found.origins["host"] == f"file {tmp_path / 'opsin.toml'}"
    assert found.origins["port"] == "environment OPSIN_PORT"
    assert found.origins["parallel"] == "flag --parallel"


def test_the_file_of_the_folder_is_read_before_that_of_the_user(tmp_path: Path) -> None:
    home = tmp_path / "xdg" / "opsin"
    home.mkdir(parents=True)
    (home / "opsin.toml").write_text("port = 7")
    assert config(tmp_path).settings.port == 7
    assert config(tmp_path, "parallel = 2").settings.port == 8000


def test_lists_switches_and_paths_come_out_of_the_environment(tmp_path: Path) -> None:
    environ = {
        "OPSIN_ALLOWED_HOSTS": "a.example, b.example",
        "OPSIN_FETCH_IMAGES": "true",
        "OPSIN_MEDIA_PATH": "~/images",
        "OPSIN_CTX": "",
    }
    settings = config(tmp_path, environ=environ).settings
    assert settings.allowed_hosts == ("a.example", "b.example")
    assert settings.fetch_images is True
    assert settings.media_path == Path.home() / "images"
    assert settings.ctx is None


@pytest.mark.parametrize(
    ("text", "environ", "sentence"),
    [
        ("prot = 8080", {}, "no setting 'prot'; the nearest one is port"),
        ("[server]\nport = 8080", {}, "no setting 'server'"),
        ("port = 70000", {}, "port (file"),
        ("", {"OPSIN_PORT": "http"}, "port (environment OPSIN_PORT)"),
        ("port = = 1", {}, "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    tmp_path: Path, text: str, environ: dict[str, str], sentence: str
) -> None:
    with pytest.raises(BadParameter) as caught:
        config(tmp_path, text, environ)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("OPSIN_PARALEL", "2", "OPSIN_PARALLEL"),
        ("OPSIN_API_KEYS", "x", "OPSIN_API_KEY"),
        ("OPSIN_SERVICE_HOST", "10.0.0.7", ""),
        ("OPSIN_PORT_8000_TCP", "tcp://10.0.0.7:8000", ""),
        ("OPSIN_PORT", "tcp://10.0.0.7:8000", "OPSIN_PORT"),
    ],
)
def test_variables_of_others_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: str, nearest: str
) -> None:
    """Kubernetes sets such for every service; a service called opsin kept the server from starting."""
    assert config(tmp_path, environ={name: value}).settings == config(tmp_path).settings
    assert name in caplog.text
    assert (f"the nearest one is {nearest}" in caplog.text) if nearest else ("nearest" not in caplog.text)


def test_what_is_printed_brings_the_same_settings_about_and_holds_no_key(tmp_path: Path) -> None:
    text = 'host = "::1"\nallowed_hosts = ["ä.example", "say \\"b\\""]\nmodel = "hf:owner/name"\nmax_seconds = 2.5\n'
    found = config(tmp_path, text, {"OPSIN_API_KEY": "very-secret"}, guard=False)
    printed = found.as_toml()
    assert "very-secret" not in printed
    assert "# flag --no-guard" in printed
    assert read_config(tomllib.loads(printed), {}, tmp_path / "nowhere").settings == found.settings
    assert all(f"{name} " in printed for name in ServerSettings.model_fields)


def test_every_setting_has_a_flag_that_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, tuple[list[str], Any]] = {
        "model": (["--model", "demo"], "demo"),
        "kv_type": (["--kv-type", "q8_0"], "q8_0"),
        "host": (["--host", "::1"], "::1"),
        "image_min_tokens": (["--image-min-tokens", "3"], 3),
    }
    arguments, wanted = [], {}
    for name, field in ServerSettings.model_fields.items():
        flag, kind = f"--{name.replace('_', '-')}", str(field.annotation)
        if name in given:
            words, value = given[name]
        elif "bool" in kind:
            value = field.default is not True
            words = [flag if value else flag.replace("--", "--no-", 1)]
        elif "tuple" in kind:
            words, value = [flag, "a.example", flag, "b.example"], ["a.example", "b.example"]
        elif "Path" in kind or "str" in kind:
            words, value = [flag, "some"], "some"
        else:
            value = {"max_top_logprobs": 10, "max_body_bytes": 2048}.get(name, 64)
            words = [flag, str(value)]
        arguments += words
        wanted[name] = value
    done = CliRunner().invoke(app, ["serve", "--print-config", *arguments])
    assert done.exit_code == 0, done.output
    assert tomllib.loads(done.stdout) == wanted
    assert done.stdout.count("# flag --") == len(wanted)
