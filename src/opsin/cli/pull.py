"""`opsin pull`: download a model and make it the default."""

from __future__ import annotations

from typing import Annotated

import typer

from opsin.cli.control import escaped


def pull(
    name: Annotated[str, typer.Argument(help="a known name (opsin models --known), or hf:OWNER/NAME[:QUANT]")],
    *,
    keep_default: Annotated[bool, typer.Option("--keep-default", help="keep the default model as it is")] = False,
) -> None:
    """Download a vision-language model and make it the default.

    A broken download goes on where it stopped. Files go to the Hugging Face cache, which llama.cpp shares.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from opsin.models.gguf import read_info
    from opsin.models.hub import pull as download

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def show(file: str, done: int, total: int) -> None:
        if not tasks:
            bars.start()  # not before: a name that is wrong has no progress to show
        if file not in tasks:
            tasks[file] = bars.add_task(file, total=total)
        bars.update(tasks[file], completed=done)

    try:
        pair = download(name, progress=show, make_default=not keep_default)
    finally:
        if tasks:
            bars.stop()
    info = read_info(pair.llm)
    typer.echo(escaped(f"{pair.name} is here: {info.architecture} {info.quantisation}, {pair.llm}"))
    if not keep_default:
        typer.echo('It is the default model now; ask it with: opsin ask PICTURE "What is this?"')
