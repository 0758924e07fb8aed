"""The table `[tuned]` of an opsin.toml: everything else in the file stays as it is, to the letter."""

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit

from opsin.core.config import TUNED, TUNED_FROM, read_file, same_file
from opsin.core.errors import BadInput, BadParameter
from opsin.core.files import write_whole


def tuned_table(model: Path, mmproj: Path | None, settings: Mapping[str, Any], remarks: Sequence[str] = ()) -> str:
    """The table as TOML; `mmproj` is the projector that was given, which `settings` may replace by another."""
    values = {"model": model, **({} if mmproj is None else {"mmproj": mmproj}), **settings}
    if mmproj is not None and values["mmproj"] != mmproj:
        values[TUNED_FROM] = mmproj
    table = tomlkit.table()
    for remark in remarks:
        table.add(tomlkit.comment(" ".join(remark.split())))
    for name, value in values.items():
        table.add(name, str(value) if isinstance(value, Path) else value)
    return tomlkit.dumps({TUNED: table})


def check_target(path: Path, model: Path | None, *, force: bool) -> None:
    """Raises BadParameter for a foreign file, and for one tuned for another model, unless `force` is given."""
    if not path.exists() or force:
        return
    try:
        _, tuned = read_file(path)
    except BadParameter as error:
        raise BadParameter(f"{error} To write over {path} all the same, give --force.") from None
    if tuned and model is not None and not same_file(tuned["model"], model):
        raise BadParameter(
            f"{path} was tuned for {tuned['model']}: give --force to replace that, or another file with --out."
        )


def write_tuned(path: Path, table: str) -> None:
    """Put the table (none, if empty) at the end of the file in one step; replace a foreign file. Raises BadInput."""
    own = read_tuned(path) is not None
    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8")) if own else tomlkit.document()
        document.pop(TUNED, None)
        rest = tomlkit.dumps(document).rstrip()
        text = "\n\n".join(filter(None, (rest, table.rstrip()))) + "\n"
        write_whole(path.resolve(), text, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644)
    except OSError as error:
        raise BadInput(f"{path} could not be written: {error.strerror or error}.") from error


def read_tuned(path: Path) -> dict[str, Any] | None:
    """The table of an opsin.toml; None where there is no such file, or a foreign one."""
    try:
        return read_file(path)[1]
    except BadParameter:
        return None
