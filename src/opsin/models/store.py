"""Which pair is the default: one small file in the user's data folder, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from opsin.core.errors import ModelNotFound
from opsin.models.pair import Pair


def state_file() -> Path:
    """`$XDG_DATA_HOME/opsin/models.json`, or its like on macOS and Windows."""
    from platformdirs import user_data_path

    return user_data_path("opsin", appauthor=False) / "models.json"


def read_default() -> Pair | None:
    """The pair chosen as default; None when none was chosen. Its files need not be there any more.

    Raises ModelNotFound when the state file is damaged.
    """
    path = state_file()
    try:
        default = json.loads(path.read_text(encoding="utf-8"))["default"]
        if default is None:
            return None
        mmproj = default["mmproj"]
        return Pair(Path(default["llm"]), Path(mmproj) if mmproj else None, str(default["name"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotFound(
            f"{path} is damaged: delete it, then choose the default again with `opsin models use NAME`"
        ) from error


def write_default(pair: Pair | None) -> None:
    """Make a pair the default; None makes it the demo model again. Raises ModelNotFound when that cannot be saved."""
    path = state_file()
    default = pair and {
        "name": pair.name,
        "llm": str(pair.llm.absolute()),
        "mmproj": str(pair.mmproj.absolute()) if pair.mmproj else None,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".models-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"version": 1, "default": default}, file, indent=2)
            Path(part).replace(path)
        finally:
            Path(part).unlink(missing_ok=True)
    except OSError as error:
        raise ModelNotFound(f"the default model cannot be saved to {path}: {error.strerror or error}") from error
