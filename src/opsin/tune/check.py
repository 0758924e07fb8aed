"""Tuned against untuned, in turn: the figures that a claim may be made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsin.bench.measure import Measured
from opsin.tune.search import Ratio, ratio_of


def ratios(measured: Mapping[str, Measured]) -> Ratio | None:
    """A workload's total time tuned over untuned; None where a side is void."""
    if any(side.void is not None or not side.runs for side in measured.values()):
        return None
    tuned, untuned = ([run.total_s for run in measured[name].runs] for name in ("tuned", "untuned"))
    return ratio_of(tuned, untuned, 0.0)


def check_document(
    measured: Sequence[Mapping[str, Measured]], about: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """One JSON document: every run's seconds, and their ratios with half of a 95 % interval."""
    rows = {}
    for sides in measured:
        ratio = ratios(sides)
        rows[sides["tuned"].workload.name] = {
            **{f"{name}_s": [round(run.total_s, 4) for run in side.runs] for name, side in sides.items()},
            "void": _void(sides),
            "ratio": None if ratio is None else round(ratio.value, 4),
            "noise": None if ratio is None else round(ratio.noise, 4),
        }
    return {"kind": "tuned", "model": dict(about), "settings": dict(settings), "workloads": rows}


def check_text(measured: Sequence[Mapping[str, Measured]]) -> str:
    """The same for people."""
    lines = []
    for sides in measured:
        workload, ratio = sides["tuned"].workload, ratios(sides)
        before, after = sides["untuned"].median, sides["tuned"].median
        told = f"counts for nothing, since {_void(sides)}"
        if ratio is not None and before is not None and after is not None:
            told = f"{before.total_s:.2f} s untuned, {after.total_s:.2f} s tuned: x{ratio.value:.3f} ±{ratio.noise:.3f}"
        lines.append(f"{workload.name}, {workload.title}: {told}")
    return "\n".join(lines)


def _void(sides: Mapping[str, Measured]) -> str | None:
    return next((f"{side.void} ({name})" for name, side in sides.items() if side.void), None)
