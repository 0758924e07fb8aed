"""`opsin models`: which models are here, and which is the default."""

import json
from contextlib import suppress
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from opsin.bench.report import columns
from opsin.cli.console import escaped, new_app
from opsin.cli.options import AsJson
from opsin.core.errors import OpsinError, PairMismatch
from opsin.models.registry import KNOWN_MODELS
from opsin.models.resolve import list_models, resolve, write_default

app = new_app("Show which models are here, and choose the default.")


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    *,
    as_json: AsJson = False,
    known: Annotated[bool, typer.Option("--known", help="list what `opsin pull` knows, with sizes")] = False,
    folder: Annotated[
        list[Path] | None, typer.Option(help="look into this as well; may be given several times")
    ] = None,
) -> None:
    """Show which models are here, and choose the default."""
    if context.invoked_subcommand is not None:
        return
    rows = _known() if known else [asdict(model) for model in list_models(folder or [])]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif known:
        for row in rows:
            row.update(download=_size(row["download_bytes"]), memory=_size(row["memory_bytes"]))
            row[""] = "*" if row["first_choice"] else ""
        _print_table(rows, "", "name", "download", "memory", "licence", "repo")
        chosen = [f"* {row['name']} is a good first choice for this machine. " for row in rows if row["first_choice"]]
        typer.echo(f"{''.join(chosen)}Sizes are estimates; memory is with a context of 4,096 tokens.")
    else:
        for row in rows:
            row[""] = "*" if row["is_default"] else ""
            row["model"] = f"{row['architecture']} + {row['projector']}" if row["architecture"] else ""
            row["size"] = _size(row["size"]) if row["size"] else ""
            row["where"] = row["problem"] or row["llm_file"]
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


def _known() -> list[dict[str, Any]]:
    """The known models with their sizes, and which of them suits this machine."""
    from opsin.compose import main_device
    from opsin.tune.predict import first_choice, known_sizes

    rows = sorted(({**asdict(row), **known_sizes(row)} for row in KNOWN_MODELS), key=itemgetter("memory_bytes"))
    choice = None
    with suppress(OpsinError):  # without a working llama.cpp the list is still of use
        device = main_device()
        # A GPU inside a CPU has the main memory, and not more time than the CPU.
        choice = first_choice(rows, device.memory_total, is_gpu=device.type == "gpu")
    return [{**row, "first_choice": row["name"] == choice} for row in rows]


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _print_table(rows: list[dict[str, Any]], *names: str) -> None:
    typer.echo(columns(names, [[escaped(str(row[name])) for name in names] for row in rows], words=len(names)))
