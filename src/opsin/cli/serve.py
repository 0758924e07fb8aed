"""`opsin serve`: settings from all their places, then the parent that keeps the server up."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from opsin.cli.console import say
from opsin.core.config import current_folder, kinds, read_config
from opsin.core.server_settings import ServerSettings
from opsin.models import locate

# No -m: that would put the working folder before the standard library.
_CHILD = "import sys; sys.path[:] = filter(None, sys.path); from opsin.cli.serve_child import main; main()"


def serve(*, print_config: bool = False, **flags: Any) -> None:
    """Answer OpenAI-compatible requests over HTTP, and show the web page.

    Settings come from opsin.toml (here, or else in $XDG_CONFIG_HOME/opsin), then the environment (OPSIN_PORT=8080),
    then flags; later ones win.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    config = read_config(given, os.environ, current_folder(), locate=locate)
    if print_config:
        sys.stdout.write(config.as_toml())
        return
    from opsin.server.supervisor import Supervisor, bind

    settings = config.settings
    with bind(settings.host, settings.port) as listener:
        logging.basicConfig(format="opsin: %(message)s", level=logging.INFO)
        say("loading the model; GET /ready answers 200 when it is there")
        hello = {"settings": settings.model_dump(mode="json", exclude_unset=True)}
        code = Supervisor([sys.executable, "-c", _CHILD], listener, hello, settings.drain_seconds).run()
    raise typer.Exit(code)


def _flag(name: str) -> inspect.Parameter:
    """One flag a field, with the field's description as help and its default told but left to the settings."""
    field = ServerSettings.model_fields[name]
    kind = next(iter(kinds(name)))
    flag = f"--{name.replace('_', '-')}"
    shape: Any = str
    more = ""
    if kind is bool:
        shape, flag = bool, f"{flag}/--no-{name.replace('_', '-')}"
    elif kind in {int, float}:
        shape = kind
    elif getattr(kind, "__origin__", None) is tuple:
        shape, more = list[str], "; may be given several times"
    elif kind not in {str, Path} and get_args(kind)[0] not in (field.description or ""):
        more = f": {', '.join(get_args(kind))}"
    if field.default not in {None, ()}:
        more += f" [default: {_shown(field.default)}]"
    option = typer.Option(flag, help=f"{field.description}{more}", show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[shape | None, option]
    )


def _shown(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else f"{value}"


# Written out, the flags would be the settings a second time, and could differ from them.
serve.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *(_flag(name) for name in ServerSettings.model_fields),
        inspect.Parameter(
            "print_config",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[
                bool, typer.Option("--print-config", help="print the settings and where each is from, and end")
            ],
        ),
    ]
)
