"""One word for all that the finding about a pair holds for, so that another setup is judged anew."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from opsin.core.settings import EngineSettings
from opsin.native.devices import Device
from opsin.native.library import library

_HEAD_BYTES = 2**20  # of a file, from its start: metadata and tensor list, or most of them


def setup_word(files: Sequence[Path | None], settings: EngineSettings, present: Sequence[Device]) -> str:
    """Names files, settings, devices, library and machine, in 32 hex digits.

    A library that was built anew keeps its version, so its files count and what it says of its instructions; the
    machine does since several may share a cache. Raises NativeMismatch, and OSError for files that are not there.
    """
    lib, models = library(), [path for path in files if path is not None]
    built = {path for name in ("*llama*", "*ggml*") for path in lib.path.parent.glob(name)}
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (*models, *sorted(built))]
    said = (version("llama-cpp-python"), lib.llama.llama_print_system_info(), platform.node())
    known = (stats, settings.model_dump_json(), [device.name for device in present], said)
    digest = hashlib.sha256(repr(known).encode())
    for path in models:
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()[:32]
