"""Does a `fix` parse as a real command? Its options are asked of the command's own parser."""

import functools
import shlex
from typing import Any

import typer

from opsin.cli.app import app

_opsin = functools.cache(typer.main.get_command)  # 30 ms each time


def parsed(fix: str | None) -> tuple[str, dict[str, Any]]:
    """The command and the options it was given; fails where `opsin` would refuse them."""
    assert fix is not None
    words = shlex.split(fix)
    assert words[0] == "opsin"
    group: Any = _opsin(app)
    with group.make_context("opsin", words[1:]) as context:
        command = group.get_command(context, words[1])
        assert command is not None
        with command.make_context(words[1], words[2:], parent=context) as made:
            ignored: list[Any] = [None, [], ()]
            given = {name: value for name, value in made.params.items() if value not in ignored}
            return words[1], {name: value for name, value in given.items() if name != "print_config"}
