"""Findings about a pair on this machine, kept as JSON in the user's cache by a fingerprint of all they hold for.

A file that cannot be read or written loses nothing: what it would say is found out again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opsin.core.files import write_whole
from opsin.core.settings import EngineSettings
from opsin.native.devices import Device
from opsin.native.library import library

_HEAD_BYTES = 2**20  # of a file, from its start: metadata and tensor list, or most of them


def fingerprint(files: Sequence[Path | None], settings: EngineSettings, present: Sequence[Device]) -> str:
    """Names files, settings, devices, library and machine in 32 hex digits.

    A library that was built anew keeps its version, so its files and features count; several machines may share a
    cache. Raises NativeMismatch, and OSError for files that are not there.
    """
    lib, models = library(), [path for path in files if path is not None]
    built = {path for name in ("*llama*", "*ggml*") for path in lib.path.parent.glob(name)}
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (*models, *sorted(built))]
    said = (version("llama-cpp-python"), lib.llama.llama_print_system_info(), platform.node())
    digest = hashlib.sha256(
        repr((stats, settings.model_dump_json(), [device.name for device in present], said)).encode()
    )
    for path in models:
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()[:32]


def record_file(kind: str, name: str, folder: Path | None = None) -> Path:
    """Where a finding is kept: in `folder` (None: in the user's cache)."""
    from platformdirs import user_cache_path

    return (folder or user_cache_path("opsin") / kind) / f"{name}.json"


def read_record(file: Path) -> Any:
    """What was kept there, None for nothing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(file.read_text(encoding="utf-8"))


def keep_record(file: Path, finding: object) -> None:
    """Write it whole or not at all, with its folder."""
    with contextlib.suppress(OSError):
        write_whole(file, json.dumps(finding))
