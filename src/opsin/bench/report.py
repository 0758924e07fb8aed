"""Results as a JSON document and as text."""

from __future__ import annotations

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

    def share(self, result: Result) -> float | None:
        """The least time a workload can take by the time it took; 1 is the ceiling. None if the result is invalid."""
        if result.median is None:
            return None
        least = self.cost.workload_seconds(self.ceiling, result.workload, result.usages)
        return round(least / result.median.total_s, 4)

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
    rows = {}
    for result in target.results:
        row = _result_row(result)
        share = None if limits is None else limits.share(result)
        rows[result.workload.name] = row if share is None else {**row, "share_of_ceiling": share}
    return {**target.about, "workloads": rows}


def _result_row(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {"title": result.workload.title, "invalid": result.invalid, "failed": result.failed}
    middle = result.median
    if middle is None:
        return row
    counts = ("prompt_tokens", "completion_tokens", "cached_tokens")
    return {
        **row,
        **_rounded(asdict(middle)),
        **{name: [getattr(usage, name) for usage in result.usages] for name in counts},
        "runs": [_rounded(asdict(run)) for run in result.runs],
    }


def as_text(targets: Sequence[Target], limits: Limits | None = None) -> str:
    """A table: each workload's figures of every target, and the first target's by each other's."""
    width = max(len(f"{targets[0].name} / {target.name}") for target in targets)
    lines = [f"{'':4} {'':{width}} " + " ".join(f"{heading:>11}" for heading in _HEADINGS)]
    compared = ratios(targets)
    for number, result in enumerate(targets[0].results):
        name = result.workload.name
        share = None if limits is None else limits.share(result)
        for target in targets:
            lines.append(f"{name:4} {target.name:{width}} {_cells(target.results[number])}")
            if limits is not None and share is not None and target is targets[0]:
                lines[-1] += f"  {share:.0%} of the ceiling of {limits.ceiling.device}"
        for target in targets[1:]:
            found = compared[target.name][name]
            cells = ["" if found[figure] is None else f"{found[figure]:.2f} x" for figure in COMPARED]
            lines.append(
                f"{'':4} {f'{targets[0].name} / {target.name}':{width}} " + " ".join(f"{c:>11}" for c in cells)
            )
    lines += [f"  {result.workload.name}: {result.workload.title}" for result in targets[0].results]
    return "\n".join(lines)


def _cells(result: Result) -> str:
    stats: Stats | None = result.median
    if stats is None:
        return f"invalid: {result.invalid}"
    cells = [f"{stats.total_s:.2f} s", *(f"{getattr(stats, figure):.1f} ms" for figure in COMPARED[1:])]
    return " ".join(f"{cell:>11}" for cell in cells)


def _rounded(value: Any) -> Any:
    """The same JSON values with four digits behind the point."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
