"""Settings out of opsin.toml, the environment and flags; later ones win, and each value knows where it came from.

A table `[tuned]` in the file, which `opsin tune` writes, holds for the model that it names, and everything else wins
over it. It is passed over when another model is asked for; what it says of memory and ubatches also when another number
of slots is.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from opsin.core.errors import BadParameter
from opsin.core.files import expand, read_text
from opsin.core.server_settings import ServerSettings
from opsin.core.settings import EngineSettings

FILE = "opsin.toml"
PREFIX = "OPSIN_"
KEY_VARIABLE = "OPSIN_API_KEY"
RETIRED = ("prefill_rows", "slice_seconds", "turn_share", "longest_turn", "profile")
"""Settings of earlier versions that have no effect any more: they are accepted, with a warning."""

_FIELDS = ServerSettings.model_fields
_FILE_BYTES = 2**20

TUNED = "tuned"
TUNED_FROM = "tuned_from"
"""In the table `[tuned]`: the projector that was given, where `mmproj` names one that was made of it."""
_LAYOUT = ("parallel", "ctx", "ubatch", "flash_attention")  # measured for so many slots
_log = logging.getLogger(__name__)

Values = dict[str, tuple[Any, str]]
Locate = Callable[[str], Path | None]


@dataclass(frozen=True, slots=True)
class Config:
    """The settings in force, and for each field the file, variable or flag that set it (or "default")."""

    settings: ServerSettings
    origins: Mapping[str, str]

    def engine(self, **more: Any) -> EngineSettings:
        """What of them is about the engine; what nobody gave keeps the engine's own default, or that of `more`."""
        given = {name: getattr(self.settings, name) for name, origin in self.origins.items() if origin != "default"}
        return EngineSettings(
            **{**more, **{name: v for name, v in given.items() if name in EngineSettings.model_fields}}
        )

    def as_toml(self) -> str:
        """The settings as an opsin.toml that would bring them about, a comment a line saying where each is from."""
        lines = []
        for name in _FIELDS:
            value = getattr(self.settings, name)
            shown = f"# {name} is not set" if value is None else f"{name} = {as_toml_value(value)}"
            lines.append(f"{shown}  # {self.origins[name]}")
        return "\n".join(lines) + "\n"


def current_folder() -> Path:
    """The current folder, or a relative path to it where it was deleted."""
    try:
        return Path.cwd()
    except OSError:
        return Path()


def read_config(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    folder: Path,
    *,
    file: Path | None = None,
    locate: Locate = lambda _: None,
    tuned: bool = True,
    parallel: int | None = None,
) -> Config:
    """What opsin.toml, the environment and the flags make together.

    The file is `file`, which must exist, or the one in `folder`, or else the one in $XDG_CONFIG_HOME/opsin. `flags`
    holds what was given, by field. `locate` gives the file of a model's known name, which is asked for only where the
    file's `[tuned]` names another; without `tuned` that table is passed over. `parallel` is the number of slots where
    nobody says it; None: as many as it was tuned for. Names of RETIRED settings are passed over with one warning.
    Raises BadParameter with one sentence for a name that does not exist and a value that cannot be.
    """
    path = file or config_path(environ, folder)
    plain, measured = ({}, {}) if path is None else _from_file(path)
    sources = [plain, _from_environment(environ), _from_flags(flags)]
    drop_retired(*sources, measured)
    if tuned and measured and _is_for(measured, sources, locate):
        sources.insert(0, _fitting(measured, sources, parallel))
    values: dict[str, Any] = {}
    origins = dict.fromkeys(_FIELDS, "default")
    for source in sources:
        if "model" in source and "model" in values and not same_file(source["model"][0], values["model"], locate):
            # A projector belongs to its model: it goes with it.
            values.pop("mmproj", None)
            origins["mmproj"] = "default"
        for name, (value, origin) in source.items():
            values[name], origins[name] = value, origin
    return Config(_checked(values, origins), origins)


def config_path(environ: Mapping[str, str], folder: Path) -> Path | None:
    """The opsin.toml that is read: the folder's, or else the user's; None where there is none."""
    home = expand(environ.get("XDG_CONFIG_HOME") or "~/.config")
    # A folder, a pipe or a link that leads nowhere under that name is a mistake to be told, not "no file".
    return next((path for path in (folder / FILE, home / "opsin" / FILE) if os.path.lexists(path)), None)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An opsin.toml's own settings, and its table `[tuned]`, with names checked. Raises BadParameter."""
    text = read_text(path, _FILE_BYTES)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadParameter(f"{path} cannot be read: {error}.") from None
    except RecursionError:
        raise BadParameter(f"{path} cannot be read: its brackets are nested too deep.") from None
    tuned = table.pop(TUNED, {})
    if not isinstance(tuned, dict) or (tuned and "model" not in tuned):
        raise BadParameter(f"{path}: [{TUNED}] names no model; let `opsin tune` write it anew.")
    for name in table:
        _check_name(name, f"{path}: there is no setting {name!r}", list(_FIELDS))
    for name in tuned:
        known = [*EngineSettings.model_fields, TUNED_FROM]
        _check_name(name, f"{path}: there is no setting {name!r} that could be tuned", known)
    return table, tuned


def drop_retired(*sources: Values) -> None:
    """Take RETIRED settings out, with one warning that names them all and where they are from."""
    found = [f"{name} ({source.pop(name)[1]})" for source in sources for name in RETIRED if name in source]
    if found:
        _log.warning("these settings have no effect any more, please remove them: %s", ", ".join(found))


def _is_for(measured: Values, sources: list[Values], locate: Locate) -> bool:
    wanted = [source["model"][0] for source in sources if "model" in source]
    model = measured["model"][0]
    if not wanted and not _is_file(model) and locate(str(model)) is None:
        _log.warning("%s is gone, so what was tuned for it is passed over (%s)", model, measured["model"][1])
        return False
    return not wanted or same_file(wanted[-1], model, locate)


def _fitting(measured: Values, sources: list[Values], parallel: int | None) -> Values:
    """What of the table holds here. Who gives the projector that the tuned one was made of means the tuned one."""
    measured = dict(measured)
    made_of, origin = measured.pop(TUNED_FROM, (None, ""))
    if made_of is not None and "mmproj" in measured:
        made, source = Path(str(measured["mmproj"][0])), Path(str(made_of))
        if source.is_file() and (not made.is_file() or made.stat().st_mtime < source.stat().st_mtime):
            _log.warning("%s is gone or older than %s, which is taken instead: run opsin tune again", made, source)
            measured["mmproj"] = made_of, origin
        for other in sources:
            if "mmproj" in other and same_file(other["mmproj"][0], made_of):
                del other["mmproj"]
    at_once = next((one["parallel"][0] for one in reversed(sources) if "parallel" in one), parallel)
    if at_once is not None and str(at_once) != str(measured.get("parallel", (None,))[0]):
        measured = {name: value for name, value in measured.items() if name not in _LAYOUT}
    return measured


def same_file(one: Any, other: Any, locate: Locate = lambda _: None) -> bool:
    """Whether two models or projectors are one file; `locate` looks a name up."""
    files = [Path(model) if _is_file(model) else locate(str(model)) for model in (one, other) if model]
    paths = [file for file in files if file is not None and file.is_file()]
    return paths[0].samefile(paths[1]) if len(paths) == 2 else str(one) == str(other)


def _is_file(path: Any) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _checked(values: dict[str, Any], origins: Mapping[str, str]) -> ServerSettings:
    from pydantic import ValidationError

    try:
        return ServerSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise BadParameter(f"{name} ({origins[name]}): {first['msg']} (given: {first['input']!r}).") from None


def _from_file(path: Path) -> tuple[Values, Values]:
    table, tuned = read_file(path)
    return (
        {name: (_expanded(name, value), f"file {path}") for name, value in table.items()},
        {name: (value, f"[{TUNED}] of {path}") for name, value in tuned.items()},
    )


def _from_environment(environ: Mapping[str, str]) -> Values:
    known = {PREFIX + name.upper(): name for name in (*_FIELDS, *RETIRED)}
    found: Values = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable == KEY_VARIABLE:
            continue
        _check_name(variable, f"The environment has {variable}, which is no setting", [*known, KEY_VARIABLE])
        name = known[variable]
        if text:  # an empty variable is as good as none
            value = [part.strip() for part in text.split(",")] if _is_list(name) else _expanded(name, text)
            found[name] = value, f"environment {variable}"
    return found


def _from_flags(flags: Mapping[str, Any]) -> Values:
    return {
        name: (value, f"flag --{'no-' if value is False else ''}{name.replace('_', '-')}")
        for name, value in flags.items()
    }


def _check_name(name: str, complaint: str, known: list[str]) -> None:
    if name in known or name in RETIRED:
        return
    near = difflib.get_close_matches(name, known, 1, 0.0)
    raise BadParameter(f"{complaint}; the nearest one is {near[0]} (opsin serve --print-config shows all).")


def _expanded(name: str, value: Any) -> Any:
    """`~` in paths; a shell does that for flags alone."""
    return str(expand(value)) if isinstance(value, str) and Path in kinds(name) else value


def _is_list(name: str) -> bool:
    return tuple in {getattr(kind, "__origin__", kind) for kind in kinds(name)}


def kinds(name: str) -> tuple[Any, ...]:
    """The types that a field's value may have, without None; none for a retired one."""
    if name not in _FIELDS:
        return ()
    annotation = _FIELDS[name].annotation
    found = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    return tuple(kind for kind in found if kind is not type(None))


def as_toml_value(value: Any) -> str:
    """A setting's value as TOML writes it."""
    # JSON's strings, numbers and booleans are TOML's as well.
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str, ensure_ascii=False)
