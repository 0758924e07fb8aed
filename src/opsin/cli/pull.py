"""`opsin pull`: download a model and make it the default."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, TaskID, TransferSpeedColumn

from opsin.cli.console import escaped, say
from opsin.models import read_info
from opsin.models.hub import pull as download
from opsin.models.registry import look_up
from opsin.tune.predict import WEIGHT_BYTES, known_sizes


def pull(
    name: Annotated[str, typer.Argument(help="a known name (opsin models --known), or hf:OWNER/NAME[:QUANT]")],
    *,
    keep_default: Annotated[bool, typer.Option("--keep-default", help="keep the default model as it is")] = False,
) -> None:
    """Download a vision-language model and make it the default.

    An interrupted download continues where it stopped. Files go to the Hugging Face cache, which llama.cpp shares.
    """
    wanted = look_up(name)
    if wanted.known and (wanted.tag.lower() or wanted.known.weights) in WEIGHT_BYTES:
        sizes = known_sizes(wanted.known, wanted.tag)
        size, memory = sizes["download_bytes"] / 1e9, sizes["memory_bytes"] / 1e9
        needs = f"about {size:.1f} GB to download and {memory:.1f} GB of memory with a context of 4,096 tokens"
        say(f"{wanted.known.title}: {needs}; licence {wanted.known.licence}")
    tasks: dict[str, TaskID] = {}
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    bars = Progress(*columns, console=Console(stderr=True))

    def show(file: str, done: int, total: int) -> None:
        bars.start()  # not before: a name that is wrong has no progress to show
        if file not in tasks:
            tasks[file] = bars.add_task(escape(file), total=total)
        bars.update(tasks[file], completed=done)

    try:
        pair = download(name, progress=show, make_default=not keep_default)
    finally:
        if tasks:
            bars.stop()
    info = read_info(pair.llm)
    typer.echo(escaped(f"{pair.name} is here: {info.architecture} {info.quantisation}, {pair.llm}"))
    if not keep_default:
        typer.echo('It is the default model now; ask it with: opsin ask IMAGE "What is this?"')
