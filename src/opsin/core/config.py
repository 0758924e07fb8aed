"""Settings out of opsin.toml, the environment and flags; later ones win, and each value knows where it came from."""

from __future__ import annotations

import difflib
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from opsin.core.errors import BadParameter
from opsin.core.server_settings import ServerSettings

_toml_reader: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

FILE = "opsin.toml"
PREFIX = "OPSIN_"
KEY_VARIABLE = "OPSIN_API_KEY"
_OTHER_VARIABLES = frozenset({KEY_VARIABLE})
_FIELDS = ServerSettings.model_fields


@dataclass(frozen=True, slots=True)
class Config:
    """The settings in force, and for each field the file, variable or flag that set it (or "default")."""

    settings: ServerSettings
    origins: Mapping[str, str]

    def as_toml(self) -> str:
        """The settings as an opsin.toml that would bring them about, a comment a line saying where each is from."""
        lines = []
        for name in _FIELDS:
            value = getattr(self.settings, name)
            shown = f"# {name} is not set" if value is None else f"{name} = {_toml(value)}"
            lines.append(f"{shown}  # {self.origins[name]}")
        return "\n".join(lines) + "\n"


def read_config(flags: Mapping[str, Any], environ: Mapping[str, str], folder: Path) -> Config:
    """What opsin.toml, the environment and the flags make together.

    The file is the one in `folder`, or else the one in $XDG_CONFIG_HOME/opsin. `flags` holds what was given, by field.
    Raises BadParameter with one sentence for a name that does not exist and a value that cannot be.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(_FIELDS, "default")
    for source in (_from_file(environ, folder), _from_environment(environ), _from_flags(flags)):
        for name, (value, origin) in source.items():
            values[name], origins[name] = value, origin
    return Config(_checked(values, origins), origins)


def _checked(values: dict[str, Any], origins: Mapping[str, str]) -> ServerSettings:
    from pydantic import ValidationError

    try:
        return ServerSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise BadParameter(f"{name} ({origins[name]}): {first['msg']} (given: {first['input']!r}).") from None


def _from_file(environ: Mapping[str, str], folder: Path) -> dict[str, tuple[Any, str]]:
    home = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = next((path for path in (folder / FILE, home / "opsin" / FILE) if path.is_file()), None)
    if path is None:
        return {}
    try:
        table = _toml_reader.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadParameter(f"{path} cannot be read: {error}.") from None
    for name in table:
        _check_name(name, f"{path}: there is no setting {name!r}", list(_FIELDS))
    return {name: (_expanded(name, value), f"file {path}") for name, value in table.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    known = {PREFIX + name.upper(): name for name in _FIELDS}
    found: dict[str, tuple[Any, str]] = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable in _OTHER_VARIABLES:
            continue
        _check_name(variable, f"The environment has {variable}, which is no setting", [*known, *_OTHER_VARIABLES])
        name = known[variable]
        if text:  # an empty variable is as good as none
            value = [part.strip() for part in text.split(",")] if _is_list(name) else _expanded(name, text)
            found[name] = value, f"environment {variable}"
    return found


def _from_flags(flags: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    return {
        name: (value, f"flag --{'no-' if value is False else ''}{name.replace('_', '-')}")
        for name, value in flags.items()
    }


def _check_name(name: str, complaint: str, known: list[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1, 0.0)
    raise BadParameter(f"{complaint}; the nearest one is {near[0]} (opsin serve --print-config shows all).")


def _expanded(name: str, value: Any) -> Any:
    """`~` in paths; a shell does that for flags alone."""
    return str(Path(value).expanduser()) if isinstance(value, str) and Path in kinds(name) else value


def _is_list(name: str) -> bool:
    return tuple in {getattr(kind, "__origin__", kind) for kind in kinds(name)}


def kinds(name: str) -> tuple[Any, ...]:
    """The types that a field's value may have, without None."""
    annotation = _FIELDS[name].annotation
    found = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    return tuple(kind for kind in found if kind is not type(None))


def _toml(value: Any) -> str:
    # JSON's strings, numbers and booleans are TOML's as well.
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str, ensure_ascii=False)
