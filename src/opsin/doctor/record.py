"""Findings about a setup, kept as JSON in the user's cache: a file that cannot be read or written loses nothing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from opsin.core.files import write_whole


def record_file(kind: str, setup: str, folder: Path | None = None) -> Path:
    """Where the finding of a kind about a setup is kept: in `folder` (none: one of the user's cache)."""
    from platformdirs import user_cache_path

    return (folder or user_cache_path("opsin") / kind) / f"{setup}.json"


def read_record(file: Path) -> Any:
    """What was kept there, None for nothing."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))


def keep_record(file: Path, finding: object) -> None:
    """Write it whole or not at all, with its folder."""
    with contextlib.suppress(OSError):
        write_whole(file, json.dumps(finding))
