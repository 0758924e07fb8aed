"""Settings out of opsin.toml, the environment and flags; later ones win, and each value knows where it came from.

The file's table `[tuned]`, which `opsin tune` writes, holds for the model that it names, and everything else wins over
it. It is ignored for another model; what was measured for its number of slots, also for another number.
"""

import difflib
import json
import logging
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from opsin.core.errors import BadParameter, found_wrong
from opsin.core.files import expand, read_text
from opsin.core.settings import RENAMED, RETIRED, EngineSettings, ServerSettings, kind_of

FILE = "opsin.toml"
PREFIX = "OPSIN_"
KEY_VARIABLE = "OPSIN_API_KEY"
TUNED = "tuned"
TUNED_FROM = "tuned_from"
"""In the table `[tuned]`: the projector that was given, where `mmproj` names one that was made of it."""

_FIELDS = ServerSettings.model_fields
_FILE_BYTES = 2**20
_FOR_SLOTS = ("parallel", "ctx", "ubatch", "flash_attention")
_ADDRESSES = ("tcp://", "udp://")
_log = logging.getLogger(__name__)

Values = dict[str, tuple[Any, str]]
Locate = Callable[[str], Path | None]


@dataclass(frozen=True, slots=True)
class Config:
    """The settings in force, and for each field the file, variable or flag that set it (or "default")."""

    settings: ServerSettings
    origins: Mapping[str, str]

    def engine(self, **defaults: Any) -> EngineSettings:
        """The engine's part; what nobody gave has the engine's own default, or that of `defaults`."""
        names = [name for name in EngineSettings.model_fields if self.origins[name] != "default"]
        return EngineSettings(**{**defaults, **{name: getattr(self.settings, name) for name in names}})

    def as_toml(self) -> str:
        """The settings as an opsin.toml with the same effect; a comment on each line says where the value is from."""
        lines = []
        for name in _FIELDS:
            value = getattr(self.settings, name)
            # JSON's strings, numbers and booleans are TOML's as well.
            text = json.dumps(list(value) if isinstance(value, tuple) else value, default=str, ensure_ascii=False)
            shown = f"# {name} is not set" if value is None else f"{name} = {text}"
            lines.append(f"{shown}  # {self.origins[name]}\n")
        return "".join(lines)


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
    """Combine opsin.toml, the environment and `flags` (what was given, by field).

    The file is `file`, which must exist, or the one in `folder`, or else the one in $XDG_CONFIG_HOME/opsin. `locate`
    finds the file of a model's known name. `tuned=False` ignores the table `[tuned]`. `parallel` is the number of slots
    where nobody sets it (None: as many as were tuned for). Raises BadParameter for unknown names and wrong values.
    """
    path = file or config_path(environ, folder)
    own, table = ({}, {}) if path is None else read_file(path)
    measured = {name: (value, f"[{TUNED}] of {path}") for name, value in table.items()}
    sources: list[Values] = [
        {name: (_read_value(name, value), f"file {path}") for name, value in own.items()},
        _from_environment(environ),
        {name: (v, f"flag --{'no-' if v is False else ''}{name.replace('_', '-')}") for name, v in flags.items()},
    ]
    settle_old(*sources, measured)
    if tuned and measured and _is_for(measured, sources, locate):
        sources.insert(0, _fitting(measured, sources, parallel))
    found: Values = {}
    for source in sources:
        if "model" in source and "model" in found and not same_file(source["model"][0], found["model"][0], locate):
            found.pop("mmproj", None)  # a projector belongs to its model
        found |= source
    origins = {name: found[name][1] if name in found else "default" for name in _FIELDS}
    settings = checked(ServerSettings, {name: value for name, (value, _) in found.items()}, origins)
    return Config(settings, origins)


def config_path(environ: Mapping[str, str], folder: Path) -> Path | None:
    """The opsin.toml that is read: the folder's, or else the user's; None if there is none."""
    home = expand(environ.get("XDG_CONFIG_HOME") or "~/.config")
    # A folder, a pipe or a broken link under that name is a mistake to report, not "no file".
    return next((path for path in (folder / FILE, home / "opsin" / FILE) if os.path.lexists(path)), None)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An opsin.toml's own settings, and its table `[tuned]`, with names checked. Raises BadParameter."""
    text = read_text(path, _FILE_BYTES)
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadParameter(f"{path} cannot be read: {error}.") from None
    tuned = table.pop(TUNED, {})
    if not isinstance(tuned, dict) or (tuned and "model" not in tuned):
        raise BadParameter(f"{path}: [{TUNED}] names no model; let `opsin tune` write it anew.")
    for name in table:
        _check_name(name, f"{path}: there is no setting {name!r}", _FIELDS)
    for name in tuned:
        known = (*EngineSettings.model_fields, TUNED_FROM)
        _check_name(name, f"{path}: there is no setting {name!r} that could be tuned", known)
    return table, tuned


def settle_old(*sources: Values) -> None:
    """Take settings of earlier versions out, or give them their new names, with a warning that names each."""
    found = [f"{name} ({source.pop(name)[1]})" for source in sources for name in RETIRED if name in source]
    if found:
        _log.warning("these settings have no effect any more, please remove them: %s", ", ".join(found))
    for source in sources:
        for old in RENAMED.keys() & source.keys():
            value, origin = source.pop(old)
            source.setdefault(RENAMED[old], (value, origin))
            _log.warning("%s (%s) is called %s now; the old name goes with the next version", old, origin, RENAMED[old])


def same_file(one: Any, other: Any, locate: Locate = lambda _: None) -> bool:
    """Whether two models or projectors, paths or names that `locate` looks up, are one file."""
    first, second = _file_of(one, locate), _file_of(other, locate)
    return first.samefile(second) if first and second else str(one) == str(other)


def checked(model: Any, values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Any:
    """A settings value; what pydantic finds wrong becomes one sentence, with where it is from. Raises BadParameter."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "options"
        if first["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            raise BadParameter(f"There is no option {name!r}: known ones are {known}.") from None
        origin = f" ({origins[str(first['loc'][0])]})" if origins and first["loc"] else ""
        raise BadParameter(f"{found_wrong(name + origin, first['msg'])} (given: {first['input']!r}).") from None


def _file_of(model: Any, locate: Locate) -> Path | None:
    try:
        path = Path(model) if Path(model).is_file() else locate(str(model))
        return path if path is not None and path.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _is_for(measured: Values, sources: list[Values], locate: Locate) -> bool:
    model, origin = measured["model"]
    wanted = [source["model"][0] for source in sources if "model" in source]
    if not wanted and _file_of(model, locate) is None:
        _log.warning("%s is gone, so what was tuned for it is ignored (%s)", model, origin)
        return False
    return not wanted or same_file(wanted[-1], model, locate)


def _fitting(measured: Values, sources: list[Values], parallel: int | None) -> Values:
    """What of the table holds here. Whoever names the projector that the tuned one was made of gets the tuned one."""
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
    slots = next((source["parallel"][0] for source in reversed(sources) if "parallel" in source), parallel)
    if slots is not None and str(slots) != str(measured.get("parallel", (None,))[0]):
        measured = {name: value for name, value in measured.items() if name not in _FOR_SLOTS}
    return measured


def _from_environment(environ: Mapping[str, str]) -> Values:
    known = {PREFIX + name.upper(): name for name in (*_FIELDS, *RETIRED, *RENAMED)}
    found: Values = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable == KEY_VARIABLE:
            continue
        if variable not in known or text.startswith(_ADDRESSES):
            # Others name theirs like ours: Kubernetes does for a service called opsin.
            there = [PREFIX + name.upper() for name in _FIELDS]
            near = difflib.get_close_matches(variable, (*there, KEY_VARIABLE), 1, 0.8)
            hint = f"; the nearest one is {near[0]}" if near else ""
            _log.warning("the environment's %s is no setting and is ignored%s", variable, hint)
        elif text:  # an empty variable counts as unset
            found[known[variable]] = _read_value(known[variable], text), f"environment {variable}"
    return found


def _check_name(name: str, complaint: str, known: Any) -> None:
    if name not in known and name not in RETIRED and name not in RENAMED:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; the nearest one is {near[0]}" if near else ""
        raise BadParameter(f"{complaint}{hint} (opsin serve --print-config shows all).")


def _read_value(name: str, value: Any) -> Any:
    """In text a list is written with commas, and `~` in a path is the home folder, as a shell does it for flags."""
    kind = kind_of(_FIELDS[name]) if isinstance(value, str) and name in _FIELDS else None
    if get_origin(kind) is tuple:
        return [part.strip() for part in value.split(",")]
    return str(expand(value)) if kind is Path else value
