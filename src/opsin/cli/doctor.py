"""`opsin doctor` looks at this machine, this build and this pair; `opsin explain` at a log. Both say what to fix."""

import json
import os
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.console import printable, working
from opsin.core.config import current_folder, read_config
from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check, worst
from opsin.doctor.examine import examine
from opsin.doctor.explain import as_text
from opsin.doctor.explain import explain as read
from opsin.models import locate

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_WIDTH, _NAME = 110, 26


@o.flags_of(EngineSettings, *EngineSettings.model_fields)
def doctor(
    *,
    as_json: o.AsJson = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="load no model: the build, the files and the memory only")
    ] = False,
    **flags: Any,
) -> None:
    """Check the build, the pair and how it runs, and prove where the vision encoder runs.

    Without --model the default model is looked at. Settings come from the flags, the environment and opsin.toml, as for
    `opsin serve`. Ends with 1 when a check fails.
    """
    settings = read_config(o.given(EngineSettings, flags), os.environ, current_folder(), locate=locate).engine()
    checks: list[Check] = []
    with working("looking at this machine") as line:
        for check in examine(settings, line.update, quick=quick):
            checks.append(check)
            if not as_json:
                line.stop()
                _print(check)
    status = worst(checks)
    if as_json:
        typer.echo(json.dumps({"status": status, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        counts = {name: sum(check.status == name for check in checks) for name in _COLOURS}
        typer.echo("\n" + ", ".join(f"{count} {name}" for name, count in counts.items()))
        if quick:
            typer.echo(
                "Nothing was loaded: `opsin doctor` without --quick also tries the pair and proves where it runs."
            )
    if status == "fail":
        raise typer.Exit(1)


def _print(check: Check) -> None:
    indent = " " * (_NAME + 7)
    text = textwrap.fill(printable(check.message), _WIDTH, initial_indent=indent, subsequent_indent=indent)
    status = typer.style(f"{check.status:<5}", fg=_COLOURS[check.status])
    typer.echo(f"{status} {check.name:<{_NAME}} {text.lstrip()}")
    if check.fix is not None:
        typer.echo(f"{indent}fix:  {printable(check.fix)}")


def explain(
    log: Annotated[str, typer.Argument(metavar="LOG|-", help="a log file, or - for standard input")],
    *,
    as_json: o.AsJson = False,
) -> None:
    """Say why a request was slow, from a log of llama.cpp, llama-cpp-python, Ollama, LM Studio or Opsin."""
    with sys.stdin.buffer if log == "-" else Path(log).open("rb") as stream:
        explanation = read(stream)
    if as_json:
        typer.echo(json.dumps(explanation.as_dict(), indent=2, ensure_ascii=False))
        return
    total = sum(row.ms for row in explanation.stages)
    for row in explanation.stages:
        ms = f"{'≤' if row.at_most else ''}{row.ms:,.1f}"
        typer.echo(f"{row.name:<22}{ms:>14} ms  {row.ms / total:>6.1%}  {row.note}".rstrip())
    if explanation.stages:
        typer.echo(f"{'total':<22}{total:>14,.1f} ms\n")
    for line in as_text(explanation):
        typer.echo(printable(line))
