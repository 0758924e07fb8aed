"""`opsin models`: which models are here, and which is the default."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from opsin.bench.report import columns
from opsin.cli.console import escaped, new_app
from opsin.cli.options import AsJson
from opsin.core.errors import PairMismatch
from opsin.models.registry import KNOWN_MODELS
from opsin.models.resolve import list_models, resolve, write_default

app = new_app("Show which models are here, and choose the default.")


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    *,
    as_json: AsJson = False,
    known: Annotated[bool, typer.Option("--known", help="list the names that `opsin pull` knows")] = False,
    folder: Annotated[
        list[Path] | None, typer.Option(help="look into this as well; may be given several times")
    ] = None,
) -> None:
    """Show which models are here, and choose the default."""
    if context.invoked_subcommand is not None:
        return
    rows = [asdict(model) for model in (KNOWN_MODELS if known else list_models(folder or []))]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif known:
        _print_table(rows, "name", "title", "repo")
    else:
        rows = [{**row, **_shown(row)} for row in rows]
        _print_table(rows, "", "name", "model", "quantisation", "size", "where")
        typer.echo("* the default; change it with `opsin models use NAME`, get more with `opsin pull NAME`")


@app.command()
def use(
    name: Annotated[str, typer.Argument(help="a name from the list, a GGUF file, a folder, or demo")],
    mmproj: Annotated[str | None, typer.Option("--mmproj", help="projector, where it is not beside the model")] = None,
) -> None:
    """Make a model the default."""
    pair = resolve(name, mmproj)
    if pair.mmproj is None:
        raise PairMismatch(f"{pair.llm} has no projector beside it, so it cannot see: give one with --mmproj")
    write_default(None if pair.is_demo else pair)
    typer.echo(escaped(f"{pair.name} is the default model now"))


def _shown(row: dict[str, Any]) -> dict[str, str]:
    size = row["size"]
    return {
        "": "*" if row["is_default"] else "",
        "model": f"{row['architecture']} + {row['projector']}" if row["architecture"] else "",
        "size": "" if not size else f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB",
        "where": row["problem"] or row["llm_file"],
    }


def _print_table(rows: list[dict[str, Any]], *names: str) -> None:
    typer.echo(columns(names, [[escaped(str(row[name])) for name in names] for row in rows], words=len(names)))
