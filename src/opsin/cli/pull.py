"""`opsin pull`: download a model and make it the default."""

from __future__ import annotations

from typing import Annotated

import typer


def pull(
    name: Annotated[str, typer.Argument(help="a known name (opsin models --known), or hf:OWNER/NAME[:QUANT]")],
    *,
    keep_default: Annotated[bool, typer.Option("--keep-default", help="leave the default model as it is")] = False,
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

    from opsin.models.gguf_info import read_info
    from opsin.models.hub import pull as download

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(file: str, done: int, total: int) -> None:
            task = tasks.get(file)
            if task is None:
                task = tasks[file] = bars.add_task(file, total=total, completed=done)
            bars.update(task, completed=done)

        pair = download(name, progress=show, make_default=not keep_default)
    info = read_info(pair.llm)
    typer.echo(f"{pair.name} is here: {info.architecture} {info.quantisation}, {pair.llm}")
    if not keep_default:
        typer.echo('It is the default model now; ask it with: opsin ask PICTURE "What is this?"')
