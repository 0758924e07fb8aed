"""How wrong predictions were: those checked on this machine, kept a JSON object a line, and the table's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from opsin.core.errors import BadInput
from opsin.tune.device_table import ANCHORS, DEVICES, Kind, Stage
from opsin.tune.predict import Times, anchor_share, share_of

STAGES: tuple[Stage, ...] = ("encode", "prefill", "decode")
FILE = "predictions.jsonl"
_KNOWN = frozenset({"machine", "model", "predicted_ms", "measured_ms", "errors"})


@dataclass(frozen=True, slots=True)
class Checked:
    """One prediction and what was measured, in milliseconds by stage. `about` holds versions, date and model."""

    machine: str
    model: str
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    about: Mapping[str, Any]

    @property
    def errors(self) -> dict[str, float]:
        """By how much the prediction was too long (positive) or too short, as a share of what was measured."""
        return {
            stage: self.predicted[stage] / self.measured[stage] - 1
            for stage in STAGES
            if self.measured.get(stage) and stage in self.predicted
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a line of the file."""
        return {
            "machine": self.machine,
            "model": self.model,
            "predicted_ms": dict(self.predicted),
            "measured_ms": dict(self.measured),
            "errors": {stage: round(error, 4) for stage, error in self.errors.items()},
            **self.about,
        }


def stage_times(times: Times) -> dict[str, float]:
    """Encode, prefill (picture and text) and one decode step, in milliseconds."""
    encode, prefill = round(times.encode_ms, 3), round(times.prefill_ms, 3)
    return {"encode": encode, "prefill": prefill, "decode": round(times.token_ms, 4)}


def history_file() -> Path:
    """Where checked predictions are kept: the user's data folder."""
    from platformdirs import user_data_path

    return user_data_path("opsin") / FILE


def read_history(path: Path | None = None) -> list[Checked]:
    """All checked predictions; lines that cannot be read are left out, and no file is an empty history."""
    try:
        lines = (path or history_file()).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
            about = {k: v for k, v in row.items() if k not in _KNOWN}
            predicted, measured = ({s: float(row[k][s]) for s in row[k]} for k in ("predicted_ms", "measured_ms"))
            found.append(Checked(str(row["machine"]), str(row["model"]), predicted, measured, about))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found


def remember(checked: Checked, path: Path | None = None) -> Path:
    """Append a checked prediction; gives back the file. Raises BadInput when it cannot be written."""
    path = path or history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(checked.as_dict()) + "\n")
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def past_errors(history: Sequence[Checked]) -> dict[str, dict[str, float]]:
    """By stage: how many checks, the median and the largest error, as shares without sign."""
    return _summed({stage: [row.errors[stage] for row in history if stage in row.errors] for stage in STAGES})


def table_errors(kind: Kind) -> dict[str, dict[str, float]]:
    """As `past_errors`: every measurement of the table, predicted from those of the kind's other devices alone."""
    errors: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for row in ANCHORS:
        others = [other for other in ANCHORS if other.device != row.device]
        there = any(other.stage == row.stage and DEVICES[other.device].kind == kind for other in others)
        if there and DEVICES[row.device].kind == kind:
            share = share_of(DEVICES[row.device], row.stage, row.weight_type, others)
            errors[row.stage].append(anchor_share(row) / share.value - 1)
    return _summed(errors)


def _summed(errors: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {
        stage: {"checks": len(of), "median": round(median(map(abs, of)), 4), "largest": round(max(map(abs, of)), 4)}
        for stage, of in errors.items()
        if of
    }
