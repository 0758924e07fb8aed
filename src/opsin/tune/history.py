"""Past predictions that were checked by a measurement, a JSON object a line, and how wrong they were."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from opsin.core.errors import BadInput
from opsin.tune.predict import Times

STAGES = ("encode", "prefill", "decode")
FILE = "predictions.jsonl"


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
    return {
        "encode": round(times.encode_ms, 3),
        "prefill": round(times.prefill_ms, 3),
        "decode": round(times.token_ms, 4),
    }


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
            about = {
                k: v for k, v in row.items() if k not in {"machine", "model", "predicted_ms", "measured_ms", "errors"}
            }
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
    found: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        errors = [abs(row.errors[stage]) for row in history if stage in row.errors]
        if errors:
            found[stage] = {"checks": len(errors), "median": round(median(errors), 4), "largest": round(max(errors), 4)}
    return found
