"""The table `[tuned]` of an opsin.toml: written at its end, and everything else of the file kept to the letter."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsin.core.config import TUNED, TUNED_FROM, as_toml_value, read_file, same_file
from opsin.core.errors import BadInput, BadParameter

_TABLE = re.compile(rf"^[ \t]*\[[ \t]*\"?{TUNED}\"?[ \t]*\][^\n]*\n?", re.MULTILINE)
_HEADER = re.compile(r"^[ \t]*\[", re.MULTILINE)


def tuned_table(model: Path, mmproj: Path | None, settings: Mapping[str, Any], remarks: Sequence[str]) -> str:
    """The table's text; `mmproj` is the projector that was given, which `settings` may replace by another."""
    values = {"model": model, **({"mmproj": mmproj} if mmproj is not None else {}), **settings}
    if mmproj is not None and values["mmproj"] != mmproj:
        values[TUNED_FROM] = mmproj
    lines = [f"# {' '.join(remark.split())}" for remark in remarks]
    lines += [f"{name} = {as_toml_value(value)}" for name, value in values.items()]
    return "\n".join([f"[{TUNED}]", *lines, ""])


def check_target(path: Path, model: Path | None, *, force: bool) -> None:
    """See before minutes are spent that the file may be written: it is not there, or an opsin.toml.

    Raises BadParameter for a foreign file, and for one that was tuned for another model, without `force`.
    """
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


def write_tuned(path: Path, table: str) -> bool:
    """Put the table (none, if empty) into the file, in one step; what else is in an opsin.toml stays.

    False when there was nothing to change. Raises BadInput.
    """
    try:
        rest = _rest(path)
        if not table and path.is_file() and rest == path.read_text(encoding="utf-8"):
            return False
        path = path.resolve()  # a link stays one
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".opsin")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{rest.rstrip()}\n\n{table}" if rest.strip() else table)
        Path(part).chmod(path.stat().st_mode if path.exists() else 0o644)
        Path(part).replace(path)
    except OSError as error:
        raise BadInput(f"{path} could not be written: {error.strerror or error}.") from error
    return True


def read_tuned(path: Path) -> dict[str, Any] | None:
    """The table of an opsin.toml; None where there is no such file, or a foreign one."""
    try:
        return read_file(path)[1]
    except BadParameter:
        return None


def _rest(path: Path) -> str:
    if read_tuned(path) is None:
        return ""  # not there, or foreign and to be replaced
    text = path.read_text(encoding="utf-8")
    found = _TABLE.search(text)
    if found is None:
        return text
    after = _HEADER.search(text, found.end())
    return text[: found.start()] + (text[after.start() :] if after else "")
