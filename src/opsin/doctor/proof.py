"""The proof of where a pair runs, remembered for a setup: it costs an encode and a prefill of its own."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from opsin.core.placement import BackendShare, Placement

_FIELDS = tuple(BackendShare.__dataclass_fields__)


def remembered(setup: str, prove: Callable[[], Placement], folder: Path | None = None) -> Placement:
    """The placement of a setup, proved now if nobody did before.

    `setup` names files, settings and library by content or by size and time; another setup is another proof. A file
    that cannot be read or written costs a new proof and nothing else.
    """
    path = (folder or _default_folder()) / f"{setup}.json"
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        placement = prove()
    with contextlib.suppress(OSError):
        write_file(path, json.dumps(_dump(placement)))
    return placement


def _default_folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("opsin") / "placement"


def _dump(placement: Placement) -> dict[str, object]:
    return {
        **placement.as_dict(),
        "encoder": {name: _row(share) for name, share in placement.encoder.items()},
        "language_model": {name: _row(share) for name, share in placement.language_model.items()},
        "notes": list(placement.notes),
    }


def _row(share: BackendShare) -> dict[str, object]:
    return {name: getattr(share, name) for name in _FIELDS}


def _read(data: dict[str, dict[str, dict[str, object]]]) -> Placement:
    encoder, model = (
        # A file of an older version lacks a field, and is as good as none.
        {name: BackendShare(**{f: row[f] for f in _FIELDS}) for name, row in data[key].items()}  # type: ignore[arg-type]
        for key in ("encoder", "language_model")
    )
    return Placement(
        encoder=encoder,
        language_model=model,
        layers_offloaded=int(data["layers_offloaded"]),  # type: ignore[call-overload]
        layers=int(data["layers"]),  # type: ignore[call-overload]
        notes=tuple(map(str, data["notes"])),
    )


def write_file(path: Path, text: str) -> None:
    """Write a small file whole or not at all, with its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)
