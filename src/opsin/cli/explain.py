"""`opsin explain LOG|-`: why a request was slow, from the log of the tool that answered it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opsin.cli.console import printable

if TYPE_CHECKING:
    from opsin.doctor.explain import Explanation
    from opsin.doctor.explain.facts import StageRow


def explain(
    log: Annotated[
        str, typer.Argument(metavar="LOG|-", help="a log file, or - to read standard input", show_default=False)
    ],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Say why a request was slow, from a log of llama-cpp-python, llama-server, llama-mtmd-cli, Ollama or Opsin."""
    explanation = _read(log)
    if as_json:
        typer.echo(json.dumps(explanation.as_dict(), indent=2, ensure_ascii=False))
        return
    from opsin.doctor.explain import as_text

    _print_table(explanation.stages)
    for line in as_text(explanation):
        typer.echo(printable(line))


def _read(log: str) -> Explanation:
    from opsin.core.errors import BadInput
    from opsin.doctor.explain import explain as read

    try:
        if log == "-":
            return read(sys.stdin.buffer)
        with Path(log).open("rb") as stream:
            return read(stream)
    except (OSError, ValueError) as error:
        # ValueError: a path with a null character, or a standard input that is closed.
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"{log} cannot be read ({reason}): give the path of a log file, or - and a pipe") from error


def _print_table(stages: tuple[StageRow, ...]) -> None:
    if not stages:
        return
    total = sum(row.ms for row in stages)
    for row in stages:
        ms = f"{'≤' if row.at_most else ''}{row.ms:,.1f}"
        typer.echo(f"{row.name:<22}{ms:>14} ms  {row.ms / total:>6.1%}  {row.note}".rstrip())
    typer.echo(f"{'total':<22}{total:>14,.1f} ms\n")
