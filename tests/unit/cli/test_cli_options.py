"""Flags that are made of settings' fields."""

from typing import Annotated, Any

import typer
from typer.main import get_command
from typer.testing import CliRunner

from opsin.cli.app import app as cli
from opsin.cli.console import new_app
from opsin.cli.options import GROUPS, flags_of, given
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings, ServerSettings


def run(*arguments: str) -> tuple[dict[str, Any], str]:
    app, seen = new_app(), {}

    @app.command()
    @flags_of(SamplingParams, "seed", "guard")
    @flags_of(EngineSettings, "ctx", "kv_type", "disk_cache")
    def command(*, ctx: Annotated[int | None, typer.Option("--ctx", help="my own")] = 7, **flags: Any) -> None:
        seen.update(flags, ctx=ctx)

    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return seen, " ".join(result.output.split())


def test_a_command_gets_what_was_given_and_none_for_the_rest() -> None:
    seen, _ = run("--seed", "3", "--no-guard", "--disk-cache")
    assert seen == {"ctx": 7, "seed": 3, "guard": False, "disk_cache": True, "kv_type": None}
    assert given(SamplingParams, seen) == {"seed": 3, "guard": False}
    assert given(EngineSettings, seen) == {"ctx": 7, "disk_cache": True}


def test_help_is_the_fields_and_a_commands_own_flag_wins() -> None:
    _, shown = run("--help")
    assert "type of the KV cache: f16, bf16, f32, q8_0, q4_0 [default: f16]" in shown
    assert "--guard / --no-guard" in shown
    assert "my own" in shown
    assert "shared by all slots" not in shown


def test_options_stand_in_groups_and_every_setting_has_one() -> None:
    command = get_command(cli).get_command(None, "ask")  # type: ignore[attr-defined]
    shown = CliRunner().invoke(cli, ["ask", "--help"]).output
    heads = [line.removesuffix(":") for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert heads == ["Arguments", "Options", "Model", "Hardware", "Images", "Video", "Answer", "Limits", "Output"]
    assert "[default: 0.2]" in shown  # the temperature's
    assert all(getattr(one, "help", None) for one in command.params if not getattr(one, "hidden", False))
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    assert set(ServerSettings.model_fields) <= set(grouped)
