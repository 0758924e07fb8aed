"""Several servers measured in turn: their figures, and how the first compares with each other one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from opsin.bench.measure import Figures, Measured

COMPARED = ("total_s", "first_token_ms", "first_token_max_ms", "token_ms", "longest_pause_ms")


@dataclass(frozen=True, slots=True)
class Side:
    """Who was measured: its name, what is known of it, and its workloads."""

    name: str
    about: dict[str, Any]
    workloads: Sequence[Measured]


def ratio(ours: Measured, theirs: Measured, figure: str) -> float | None:
    """The median over the runs of our figure by theirs, of the same run; below 1 ours is less. None: either is void."""
    if ours.median is None or theirs.median is None:
        return None
    pairs = zip(ours.runs, theirs.runs, strict=True)
    found = [getattr(a, figure) / getattr(b, figure) for a, b in pairs if getattr(b, figure) > 0]
    return round(median(found), 4) if found else None


def ratios(sides: Sequence[Side]) -> dict[str, dict[str, dict[str, float | None]]]:
    """By name of the other side, workload and figure: the first side's by the other's."""
    first, *others = sides
    return {
        other.name: {
            ours.workload.name: {figure: ratio(ours, theirs, figure) for figure in COMPARED}
            for ours, theirs in zip(first.workloads, other.workloads, strict=True)
        }
        for other in others
    }


def side_document(side: Side) -> dict[str, Any]:
    """One side's figures as JSON values."""
    return {**side.about, "workloads": {m.workload.name: workload_row(m) for m in side.workloads}}


def workload_row(measured: Measured) -> dict[str, Any]:
    """A workload's medians, token counts and runs."""
    row: dict[str, Any] = {"title": measured.workload.title, "void": measured.void, "failed": measured.failed}
    middle = measured.median
    if middle is None:
        return row
    row |= figures_row(middle)
    row["prompt_tokens"] = [usage.prompt_tokens for usage in measured.usages]
    row["completion_tokens"] = [usage.completion_tokens for usage in measured.usages]
    row["cached_tokens"] = [usage.cached_tokens for usage in measured.usages]
    row["runs"] = [figures_row(run) for run in measured.runs]
    return row


def figures_row(figures: Figures) -> dict[str, Any]:
    """Figures as JSON values, rounded."""
    row = {name: round(value, 4) for name, value in asdict(figures).items() if isinstance(value, float)}
    return row | {"first_tokens_ms": [round(value, 4) for value in figures.first_tokens_ms]}


def compare_text(sides: Sequence[Side]) -> str:
    """A table: each workload's figures side by side, and what the first side's are of the others'."""
    width = max(len(side.name) for side in sides) + 2
    lines = [f"{'':8} {'':{width}} {'total':>9} {'first token':>12} {'slowest':>10} {'a token':>10} {'pause':>10}"]
    compared = ratios(sides)
    for number, measured in enumerate(sides[0].workloads):
        for side in sides:
            lines.append(_line(side, side.workloads[number], width))
            if side is not sides[0]:
                name = measured.workload.name
                found = compared[side.name][name]
                cells = [f"{'' if found[f] is None else format(found[f], '.2f')} x" for f in COMPARED]
                label = f"{sides[0].name} / {side.name}"[: width + 8]
                lines.append(
                    f"  {label:{width + 6}} {cells[0]:>9} {cells[1]:>12} {cells[2]:>10} "
                    + " ".join(f"{c:>10}" for c in cells[3:])
                )
    return "\n".join(lines)


def _line(side: Side, measured: Measured, width: int) -> str:
    head, middle = f"{measured.workload.name:8} {side.name:{width}}", measured.median
    if middle is None:
        return f"{head} void: {measured.void}"
    return (
        f"{head} {middle.total_s:7.2f} s {middle.first_token_ms:9.0f} ms {middle.first_token_max_ms:7.0f} ms"
        f" {middle.token_ms:7.1f} ms {middle.longest_pause_ms:7.0f} ms"
    )
