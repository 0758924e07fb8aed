"""Writes the reference page of the server's settings: `python tools/settings_page.py > docs/settings.md`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from opsin.core.config import KEY_VARIABLE, PREFIX
from opsin.core.settings import RETIRED, ServerSettings, kind_of

_HEAD = f"""# Settings of `opsin serve`

Put settings into `opsin.toml`, into the environment, or on the command line; if one is set in several places, the
command line wins, then the environment. `opsin serve --print-config` shows what is in force and where each value is
from, in the form of an `opsin.toml`:

```toml
parallel = 4
allowed_hosts = ["a.example", "b.example"]
fetch_images = true
```

The file is the `opsin.toml` of the current folder, or else the one in `$XDG_CONFIG_HOME/opsin` (`~/.config/opsin`).
In the environment lists are written with commas (`{PREFIX}ALLOWED_HOSTS=a.example,b.example`), and an empty variable
counts as unset. On the command line a list is a flag given several times, and a switch has a `--no-` form. A name that
does not exist is refused in the file, and in the environment ignored with a warning. A table `[tuned]` in the file is
written by `opsin tune` (`docs/tune.md`): it holds for the model that it names, and everything else wins over it. `opsin
ask`, `chat`, `bench engine` and the Python API read the settings of the model and the engine from the same places.

API keys are not settings, so they are never printed: they are the lines of the file that `api_key_file` names, and the
value of `{KEY_VARIABLE}`.

Settings of earlier versions that have no effect any more are accepted with a warning:
{", ".join(f"`{name}`" for name in RETIRED)}.

| setting | variable | flag | value | default | what it is |
| --- | --- | --- | --- | --- | --- |
"""


def settings_page() -> str:
    """The page as Markdown, made of the settings' own fields."""
    rows = []
    for name, field in ServerSettings.model_fields.items():
        cells = (
            f"`{name}`",
            f"`{PREFIX}{name.upper()}`",
            f"`--{name.replace('_', '-')}`",
            _value(kind_of(field)),
            _default(field.default),
            (field.description or "").replace("|", "\\|"),
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    return _HEAD + "".join(rows)


def _value(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "list of texts"
    if not isinstance(kind, type):
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    return {bool: "switch", int: "whole number", float: "number", Path: "path"}.get(kind, "text")


def _default(value: Any) -> str:
    if value is None or value == ():
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else f"{value}"


if __name__ == "__main__":
    sys.stdout.write(settings_page())
