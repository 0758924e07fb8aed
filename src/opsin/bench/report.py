"""Results as a JSON document and as text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

from opsin.bench.cost import Ceiling, ModelCost
from opsin.bench.workloads import Result, Stats

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
        ceiling, cost = self.ceiling, self.cost
        encode_ms = None if cost.encode_ops is None else cost.encode_ops / ceiling.matrix_ops_s * 1e3
        step_ms, token_ms = cost.step_seconds(ceiling, [0]) * 1e3, cost.prompt_seconds(ceiling, 1) * 1e3
        least = {"decode_step_ms": step_ms, "prefill_token_ms": token_ms, "encode_ms": encode_ms}
        return {"machine": rounded(asdict(ceiling)), "least": rounded(least)}

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
            row |= rounded(asdict(stats))
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
                row[name] = [getattr(usage, name) for usage in result.usages]
            row["runs"] = [rounded(asdict(run)) for run in result.runs]
            if limits is not None:
                row["share_of_ceiling"] = round(limits.share(result, stats), 4)
        rows[result.workload.name] = row
    return {**target.about, "workloads": rows}


def columns(headings: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table as text, never wrapped or cut; all columns but the first `words` hold figures."""
    padded = []
    for number, column in enumerate(zip_longest(headings, *rows, fillvalue="")):
        width = max(map(len, column))
        padded.append([cell.ljust(width) if number < words else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def as_text(targets: Sequence[Target], limits: Limits | None = None) -> str:
    """A table: each workload's figures of every target, and the first target's by each other's."""
    first, *others = targets
    rows: list[list[str]] = []
    notes = [f"  {result.workload.name}: {result.workload.title}" for result in first.results]
    for number, result in enumerate(first.results):
        for target in targets:
            found = target.results[number]
            row = [result.workload.name, target.name]
            if (stats := found.median) is not None:
                row += [f"{stats.total_s:.2f} s", *(f"{getattr(stats, figure):.1f} ms" for figure in COMPARED[1:])]
                if limits is not None and target is first:
                    row.append(f"{limits.share(found, stats):.0%} of the ceiling")
            rows.append(row)
            notes += [f"{target.name} in {result.workload.name} is invalid: {found.invalid}"] if found.invalid else []
        for target in others:
            by = [ratio(result, target.results[number], figure) for figure in COMPARED]
            rows.append(["", f"{first.name} / {target.name}", *("" if x is None else f"{x:.2f} x" for x in by)])
    return "\n".join([columns(("", "", *_HEADINGS, ""), rows, words=2), *notes])


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same JSON values with four digits behind the point; null for what is infinite."""
    text = json.dumps(values)
    return dict(json.loads(text, parse_float=lambda number: round(float(number), 4), parse_constant=lambda _: None))
