"""`opsin doctor`: look at this machine, this build and this pair; say what is wrong and how to fix it."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.console import Working, printable
from opsin.core.settings import EngineSettings

if TYPE_CHECKING:
    from opsin.doctor.check import Check
    from opsin.doctor.examine import LoadedPair
    from opsin.doctor.pair import PairInfo

_COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "fail": "\x1b[31m"}
_WIDTH, _NAME = 110, 26


@o.flags_of(EngineSettings, *EngineSettings.model_fields)
def doctor(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, with the evidence")] = False,
    **flags: Any,
) -> None:
    """Check the build, the pair and how it runs, and prove where the vision encoder runs.

    Without --model the default model is looked at. Settings come from the flags, the environment and opsin.toml, as for
    `opsin serve`. Ends with 1 when a check fails.
    """
    from opsin.core.config import current_folder, read_config
    from opsin.doctor.check import worst
    from opsin.doctor.examine import examine
    from opsin.models import locate

    settings = read_config(o.given(EngineSettings, flags), os.environ, current_folder(), locate=locate).engine()
    checks: list[Check] = []
    with Working("looking at this machine") as working:
        for check in examine(settings, _open, working.update):
            checks.append(check)
            if not as_json:
                working.stop()
                _print(check)
    status = worst(checks)
    if as_json:
        typer.echo(json.dumps({"status": status, "checks": [check.as_dict() for check in checks]}, indent=2))
    else:
        counts = {name: sum(check.status == name for check in checks) for name in ("ok", "warn", "fail")}
        typer.echo("\n" + ", ".join(f"{count} {name}" for name, count in counts.items()))
    if status == "fail":
        raise typer.Exit(1)


def _open(settings: EngineSettings, info: PairInfo) -> LoadedPair:
    from opsin.compose import open_runtime
    from opsin.doctor.examine import LoadedPair

    # The images drawn for it are of no use later.
    settings = settings.model_copy(update={"disk_cache": False})
    runtime = open_runtime(settings.model, settings.mmproj, settings, trial=False, known=(info.pair, info.facts))
    assert runtime.backend is not None
    assert runtime.template is not None
    return LoadedPair(runtime.engine, runtime.prompts, runtime.backend, runtime.template, runtime.close)


def _print(check: Check) -> None:
    colour, end = (_COLOURS[check.status], "\x1b[0m") if sys.stdout.isatty() else ("", "")
    first, *more = textwrap.wrap(printable(check.message), _WIDTH - _NAME - 7)
    typer.echo(f"{colour}{check.status:<5}{end} {check.name:<{_NAME}} {first}")
    for line in more:
        typer.echo(" " * (_NAME + 7) + line)
    if check.fix is not None:
        typer.echo(" " * (_NAME + 7) + f"fix:  {printable(check.fix)}")
