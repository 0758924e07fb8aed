"""`opsin synth`: write a random-weight model for measuring speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opsin.models.shapes import SHAPES
from opsin.models.synth import LLM_TYPES, MMPROJ_TYPES, write_pair


def synth(
    *,
    shape: Annotated[str, typer.Option("--shape", help=", ".join(SHAPES))] = "small",
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write to")] = Path(),
    quantisation: Annotated[str, typer.Option("--type", help=", ".join(LLM_TYPES))] = "q8_0",
    mmproj_type: Annotated[str, typer.Option("--mmproj-type", help=", ".join(MMPROJ_TYPES))] = "f16",
    seed: Annotated[int, typer.Option("--seed", min=0, help="the same seed writes the same bytes")] = 0,
    template: Annotated[bool, typer.Option("--template/--no-template", help="put a chat template in")] = True,
    force: Annotated[bool, typer.Option("--force", help="write over files that are there")] = False,
) -> None:
    """Write a pair of GGUF files with random weights.

    It answers nonsense at the speed of a real model of that size, so speed can be measured without a download.
    """
    pair = write_pair(
        shape,
        out,
        quantisation=quantisation,
        mmproj_type=mmproj_type,
        seed=seed,
        template=template,
        force=force,
    )
    for path in (pair.llm, pair.mmproj):
        if path is not None:
            typer.echo(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
