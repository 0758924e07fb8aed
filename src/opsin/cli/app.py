"""The `opsin` command: finds the file of a command by its name, so that `--help` imports none of them."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from opsin import __version__
from opsin.core.errors import OpsinError

COMMANDS = {
    "ask": "Ask a question about pictures.",
    "chat": "Talk about a picture in the terminal.",
    "serve": "Answer OpenAI-compatible requests over HTTP, with a web page.",
    "pull": "Download a model by name.",
    "models": "List the models that are here, and choose the default.",
    "bench": "Measure the engine against the limits of this machine.",
    "doctor": "Check the build, the pair and how it runs; prove where the vision encoder runs.",
    "explain": "Say why a request was slow, from a log of this tool or of another.",
    "tune": "Measure settings on this machine, and write those that win to opsin.toml.",
    "predict": "Expected stage times of a model on a device.",
    "synth": "Write a random-weight pair of a model's shape, to measure speed without a download.",
}


class LazyGroup(TyperGroup):
    """Commands are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click's signature
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None when there is none."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(f"opsin.cli.{cmd_name}")
        sub = getattr(module, "app", None)
        if sub is None:
            sub = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            sub.command(name=cmd_name)(getattr(module, cmd_name))
        command = typer.main.get_command(sub)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """The table, without an import."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=LazyGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True
)


@app.callback()
def opsin(
    *,
    version: bool = typer.Option(False, "--version", help="Print the version and end."),
) -> None:
    """Ask pictures questions on your own hardware, and see where every millisecond went."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command; one sentence and an exit code for what goes wrong."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A pipe on Windows may know 256 characters: better a question mark than no answer.
            stream.reconfigure(errors="replace")
    try:
        app(standalone_mode=True)
    except OpsinError as error:
        sys.stderr.write(f"opsin: {error}\n")
        _leave(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        _leave(130)
    except BrokenPipeError:
        # The reader of our output went away; Python would complain once more while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(141)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)
