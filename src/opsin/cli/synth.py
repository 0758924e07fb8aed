"""`opsin synth`: write a random-weight model for measuring speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def synth(
    *,
    shape: Annotated[str, typer.Option("--shape", help="tiny, small, llava-1.5-7b or llava-1.5-13b")] = "small",
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write to")] = Path(),
    quantisation: Annotated[str, typer.Option("--type", help="f16, bf16, q8_0 or q4_0")] = "q8_0",
    mmproj_type: Annotated[str, typer.Option("--mmproj-type", help="f16, bf16, q8_0 or f32")] = "f16",
    seed: Annotated[int, typer.Option("--seed", min=0, help="the same seed writes the same bytes")] = 0,
    template: Annotated[bool, typer.Option("--template/--no-template", help="put a chat template in")] = True,
    force: Annotated[bool, typer.Option("--force", help="write over files that are there")] = False,
) -> None:
    """Write a pair of GGUF files with random weights.

    It answers nonsense at the speed of a real model of that size, so speed can be measured without a download.
    """
    from opsin.models.synth import write_pair

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
