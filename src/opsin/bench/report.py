"""Results as a JSON document and as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from opsin.bench.cost import Ceiling, ModelCost
from opsin.bench.run import Result, Stats

COMPARED = ("total_s", "first_token_ms", "first_token_max_ms", "token_ms", "longest_pause_ms")
_HEADINGS = ("total", "first token", "slowest", "a token", "pause")


@dataclass(frozen=True, slots=True)
class Target:
    """Who was measured: its name, what is known about it, and its results, in the same order for all targets."""

    name: str
    about: dict[str, Any]
    results: Sequence[Result]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device can do at best and what the model needs at least."""

    ceiling: Ceiling
    cost: ModelCost

    def share(self, result: Result, stats: Stats) -> float:
        """The least time a workload can take by the time it took; 1 is the ceiling."""
        return self.cost.workload_seconds(self.ceiling, result.workload, result.usages) / stats.total_s

    def document(self) -> dict[str, Any]:
        """JSON values; the least times are those of one sequence without context."""
        ceiling, encode = self.ceiling, self.cost.encode_ops
        least = {
            "decode_step_ms": self.cost.step_seconds(ceiling, [0]) * 1e3,
            "prefill_token_ms": self.cost.prompt_seconds(ceiling, 1) * 1e3,
            "encode_ms": None if encode is None else encode / ceiling.matrix_ops_s * 1e3,
        }
        return {"machine": _rounded(asdict(ceiling)), "least": _rounded(least)}

    def text(self) -> str:
        """The same in two lines."""
        ceiling, least = self.ceiling, self.document()["least"]
        image = "" if least["encode_ms"] is None else f", encoding an image {least['encode_ms']:.1f} ms"
        return (
            f"{ceiling.device}: {ceiling.read_bytes_s / 1e9:.1f} GB/s, {ceiling.matrix_ops_s / 1e9:.0f} GFLOP/s\n"
            f"so a decode step takes at least {least['decode_step_ms']:.2f} ms,"
            f" a prompt token {least['prefill_token_ms']:.3f} ms{image}"
        )


def ratio(ours: Result, theirs: Result, figure: str) -> float | None:
    """The median over the runs of our figure by theirs in the same run; None if either is invalid."""
    if ours.median is None or theirs.median is None:
        return None
    pairs = zip(ours.runs, theirs.runs, strict=True)
    found = [getattr(a, figure) / getattr(b, figure) for a, b in pairs if getattr(b, figure) > 0]
    return round(median(found), 4) if found else None


def ratios(targets: Sequence[Target]) -> dict[str, dict[str, dict[str, float | None]]]:
    """By the other target's name, workload and figure: the first target's figure by the other's."""
    first, *others = targets
    return {
        other.name: {
            ours.workload.name: {figure: ratio(ours, theirs, figure) for figure in COMPARED}
            for ours, theirs in zip(first.results, other.results, strict=True)
        }
        for other in others
    }


def target_document(target: Target, limits: Limits | None = None) -> dict[str, Any]:
    """One target's results as JSON values, with shares of the ceiling where it is known."""
    rows: dict[str, dict[str, Any]] = {}
    for result in target.results:
        row: dict[str, Any] = {"title": result.workload.title, "invalid": result.invalid, "failed": result.failed}
        if (stats := result.median) is not None:
            row |= _rounded(asdict(stats))
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
                row[name] = [getattr(usage, name) for usage in result.usages]
            row["runs"] = [_rounded(asdict(run)) for run in result.runs]
            if limits is not None:
                row["share_of_ceiling"] = round(limits.share(result, stats), 4)
        rows[result.workload.name] = row
    return {**target.about, "workloads": rows}


def as_text(targets: Sequence[Target], limits: Limits | None = None) -> str:
    """A table: each workload's figures of every target, and the first target's by each other's."""
    first, *others = targets
    width = max(len(f"{first.name} / {target.name}") for target in targets)
    lines = [_line("", "", width, _HEADINGS)]
    for number, result in enumerate(first.results):
        name = result.workload.name
        for target in targets:
            stats = target.results[number].median
            if stats is None:
                lines.append(f"{name:4} {target.name:{width}} invalid: {target.results[number].invalid}")
                continue
            cells = [f"{stats.total_s:.2f} s", *(f"{getattr(stats, figure):.1f} ms" for figure in COMPARED[1:])]
            lines.append(_line(name, target.name, width, cells))
            if limits is not None and target is first:
                lines[-1] += f"  {limits.share(result, stats):.0%} of the ceiling of {limits.ceiling.device}"
        for target in others:
            found = [ratio(result, target.results[number], figure) for figure in COMPARED]
            cells = ["" if value is None else f"{value:.2f} x" for value in found]
            lines.append(_line("", f"{first.name} / {target.name}", width, cells))
    return "\n".join([*lines, *(f"  {result.workload.name}: {result.workload.title}" for result in first.results)])


def _line(workload: str, name: str, width: int, cells: Sequence[str]) -> str:
    return f"{workload:4} {name:{width}} " + " ".join(f"{cell:>11}" for cell in cells)


def _rounded(value: Any) -> Any:
    """The same JSON values with four digits behind the point."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 4))
