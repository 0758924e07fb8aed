"""The `opsin` command: finds the file of a command by its name, so that `--help` imports none of them."""

import errno
import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from opsin import __version__
from opsin.cli.console import new_app, open_standard_streams, say
from opsin.core.errors import EngineError, OpsinError
from opsin.core.files import read_table

COMMANDS: dict[str, str] = read_table(__file__, "commands.toml")
"""What `--help` says of each command, by its name."""
_FILES = {"explain": "doctor"}
LEAST_ADDRESS_SPACE = 768 << 20
"""Bytes of address space (`ulimit -v`) that any command needs. With less, whatever asks first for memory fails, in
threads and libraries that do not survive it."""


class LazyGroup(TyperGroup):
    """Commands are imported when they are called."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None when there is none."""
        if cmd_name in self.commands or cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        _check_address_space()
        module = importlib.import_module(f"opsin.cli.{_FILES.get(cmd_name, cmd_name)}")
        sub = getattr(module, "app", None)
        if sub is None:
            from opsin.cli.options import GroupedCommand

            sub = new_app()
            sub.command(name=cmd_name, cls=GroupedCommand)(getattr(module, cmd_name))
        command = typer.main.get_command(sub)
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a reader who closed the pipe is no error of ours, and has an exit code of its own."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(141) from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - Typer's signature
        """The table, without an import."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = new_app(cls=LazyGroup, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


@app.callback(invoke_without_command=True)
def opsin(*, version: bool = typer.Option(False, "--version", "-V", help="Print the version and end.")) -> None:
    """Ask images questions on your own hardware, and see where every millisecond went."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _check_address_space() -> None:
    """Raise EngineError where a process may have less than Opsin needs."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY and most < LEAST_ADDRESS_SPACE:
        raise EngineError(
            f"A process may have {most / 1e6:,.0f} MB of address space here, and Opsin needs "
            f"{LEAST_ADDRESS_SPACE / 1e6:,.0f} MB and room for the model: raise the limit (ulimit -v unlimited)."
        )


def main() -> None:
    """Run the command; one sentence and an exit code for what goes wrong."""
    open_standard_streams()
    if sys.argv[1:2] == ["help"]:  # opsin help ask
        sys.argv[1:] = [*sys.argv[2:], "--help"]
    code: int | str | None = 0
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        code = end.code
    except BrokenPipeError:
        code = 141
    except KeyboardInterrupt:
        code = 130
    except OpsinError as error:
        say(f"opsin: {error}")
        code = error.exit_code
    except (MemoryError, RuntimeError, OSError) as error:
        code = _code_of(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Nobody reads it any more; Python would complain once more while it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(code)


def _code_of(error: Exception) -> int:
    """Say what the system refused; the exit code. Raises what is no such error."""
    if isinstance(error, MemoryError) or "new thread" in str(error) or getattr(error, "errno", 0) == errno.ENOMEM:
        say("opsin: there is not enough memory for this: free some, or choose a smaller model.")
        return 4
    if not isinstance(error, OSError):
        raise error
    say(f"opsin: {error.filename or 'standard output'} cannot be used: {error.strerror or error}.")
    return 2 if error.filename else 1
