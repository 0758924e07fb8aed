"""The proof of where a pair runs, remembered for a setup: it costs an encode and a prefill of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opsin.core.placement import BackendShare, Placement
from opsin.doctor.record import keep_record, read_record, record_file

_FIELDS = tuple(BackendShare.__dataclass_fields__)


def remembered(setup: str, prove: Callable[[], Placement], folder: Path | None = None) -> Placement:
    """The placement of a setup, proved now if nobody did before.

    `setup` names files, settings and library by content or by size and time; another setup is another proof. A file
    that cannot be read or written costs a new proof and nothing else.
    """
    file = record_file("placement", setup, folder)
    try:
        return _read(read_record(file))
    except (ValueError, TypeError, KeyError, AttributeError):
        placement = prove()
    keep_record(file, asdict(placement))
    return placement


def _read(data: Any) -> Placement:
    encoder, model = (
        # A file of an older version lacks a field, and is as good as none.
        {name: BackendShare(**{f: row[f] for f in _FIELDS}) for name, row in data[key].items()}
        for key in ("encoder", "language_model")
    )
    return Placement(encoder, model, int(data["layers_offloaded"]), int(data["layers"]), tuple(map(str, data["notes"])))
