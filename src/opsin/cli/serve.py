"""`opsin serve`: settings from all their places, then the parent that keeps the server up."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer

from opsin.cli.console import say
from opsin.cli.options import flags_of, given
from opsin.core.config import current_folder, read_config
from opsin.core.server_settings import ServerSettings
from opsin.models import locate

# No -m: that would put the working folder before the standard library.
_CHILD = "import sys; sys.path[:] = filter(None, sys.path); from opsin.cli.serve_child import main; main()"


@flags_of(ServerSettings, *ServerSettings.model_fields)
def serve(
    *,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the settings and where each is from, and end")
    ] = False,
    **flags: Any,
) -> None:
    """Answer OpenAI-compatible requests over HTTP, and show the web page.

    Settings come from opsin.toml (here, or else in $XDG_CONFIG_HOME/opsin), then the environment (OPSIN_PORT=8080),
    then flags; later ones win.
    """
    config = read_config(given(ServerSettings, flags), os.environ, current_folder(), locate=locate)
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
