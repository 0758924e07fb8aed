"""`opsin synth`: runs the repository's `tools/synth.py`, which no wheel contains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from opsin.cli.console import new_app
from opsin.core.errors import BadParameter

TOOL = Path(__file__).parents[3] / "tools" / "synth.py"

app = new_app()


@app.command(
    "synth", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def synth(context: typer.Context) -> None:
    """Write a random-weight pair of a model's shape; `--help` shows the options."""
    if not TOOL.is_file():
        raise BadParameter(
            "opsin synth needs a checkout of the repository, and this is an installed package: "
            "clone it and run `python tools/synth.py` there."
        )
    raise typer.Exit(subprocess.run([sys.executable, str(TOOL), *context.args], check=False).returncode)  # noqa: S603 - the user's own arguments
