#!/usr/bin/env python3
"""Write a pair of GGUF files with random weights, to measure speed where no model can be downloaded.

    python tools/synth.py --shape tinyllama-1.1b --type q4_0 --out models

The pair answers nonsense at the speed of a real model of that size. Needs the packages `opsin` (this checkout's is
used where it is not installed), `numpy` and `gguf`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent / "src") if str(folder) not in sys.path]

import typer  # noqa: E402 - the paths above come first

from opsin.core.errors import OpsinError  # noqa: E402
from synth import LLM_TYPES, MMPROJ_TYPES, SHAPES, write_pair  # noqa: E402 - the folder beside this file


def main(
    *,
    shape: Annotated[str, typer.Option("--shape", help=", ".join(SHAPES))] = "small",
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write to")] = Path(),
    quantisation: Annotated[str, typer.Option("--type", help=", ".join(LLM_TYPES))] = "q8_0",
    mmproj_type: Annotated[str, typer.Option("--mmproj-type", help=", ".join(MMPROJ_TYPES))] = "f16",
    seed: Annotated[int, typer.Option("--seed", min=0, help="the same seed writes the same bytes")] = 0,
    template: Annotated[bool, typer.Option("--template/--no-template", help="include a chat template")] = True,
    force: Annotated[bool, typer.Option("--force", help="overwrite existing files")] = False,
) -> None:
    """Write a pair of GGUF files with random weights.

    It answers nonsense at the speed of a real model of that size, so speed can be measured without a download.
    """
    try:
        pair = write_pair(
            shape,
            out,
            quantisation=quantisation,
            mmproj_type=mmproj_type,
            seed=seed,
            template=template,
            force=force,
        )
    except OpsinError as error:
        sys.stderr.write(f"synth: {error}\n")
        raise typer.Exit(error.exit_code) from None
    for path in (pair.llm, pair.mmproj):
        if path is not None:
            typer.echo(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name="synth")(main)
    app()
