"""Figures as a document for machines and as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from opsin.bench.batched import Batched
from opsin.bench.ceiling import Machine
from opsin.bench.compare import Side, compare_text, ratios, side_document, workload_row
from opsin.bench.cost import ModelCost
from opsin.bench.measure import Measured


@dataclass(frozen=True, slots=True)
class Results:
    """All that one call of the command measured. `about` names model, version and settings, `peers` ran in turn.

    `plain` and `schema` are runs of full batches, `batched_bench` what llama.cpp's own program made of the same in the
    same runs, in tokens a second, with `batched_bench_flash` for flash attention (None: its default).
    """

    about: dict[str, Any]
    machine: Machine
    cost: ModelCost
    workloads: Sequence[Measured] = ()
    plain: Sequence[Batched] = ()
    schema: Sequence[Batched] = ()
    batched_bench: Sequence[float] = ()
    batched_bench_flash: bool | None = None
    peers: Sequence[Side] = ()

    @property
    def sides(self) -> tuple[Side, ...]:
        """The engine, then the peers."""
        return (Side("opsin", {}, self.workloads), *self.peers)


def as_document(results: Results) -> dict[str, Any]:
    """One JSON document."""
    batched: dict[str, Any] | None = None
    if results.plain:
        batched = {"plain": _rounded(asdict(_middle(results.plain)))}
        if results.schema:
            batched |= {"json_schema": _rounded(asdict(_middle(results.schema)))}
            batched |= {"json_schema_cost": schema_cost(results)}
            batched |= {"json_schema_runs": [_rounded(asdict(run)) for run in results.schema]}
        if results.batched_bench:
            batched |= {"llama_batched_bench_tokens_s": round(median(results.batched_bench), 1)}
            batched |= {"llama_batched_bench_flash_attention": results.batched_bench_flash}
            batched |= {"of_llama_batched_bench": _of_batched_bench(results)}
        batched["runs"] = [_rounded(asdict(run)) for run in results.plain]
        batched["llama_batched_bench_runs"] = [round(rate, 1) for rate in results.batched_bench]
    document = {
        **results.about,
        "machine": _rounded(asdict(results.machine)),
        "ceiling": _ceiling(results),
        "workloads": {measured.workload.name: _workload(results, measured) for measured in results.workloads},
        "batched": batched,
    }
    if results.peers:
        document["peers"] = {side.name: side_document(side) for side in results.peers}
        document["ratios"] = ratios(results.sides)
    return document


def schema_cost(results: Results) -> float | None:
    """The share of the plain rate that schemas cost where decode calls take the same; None when a run is void.

    The calls compute the same, so only the time beside them is compared. A busy machine changes the rates of two runs
    by more than that whole time. The least disturbed plain run is what it is added to.
    """
    pairs = list(zip(results.plain, results.schema, strict=False))
    if not pairs or any(run.void is not None for pair in pairs for run in pair):
        return None
    extra = median(_beside(schema) - _beside(plain) for plain, schema in pairs)
    return round(extra / (1 / max(plain.tokens_s for plain, _ in pairs) + extra), 4)


def _beside(run: Batched) -> float:
    """Seconds a token beside the decode calls."""
    return (1 - run.decode_share) / run.tokens_s


def _of_batched_bench(results: Results) -> dict[str, float] | None:
    """Our rates by those of llama.cpp's own program, the medians over the runs."""
    pairs = list(zip(results.plain, results.batched_bench, strict=True))
    if any(run.void is not None for run, _ in pairs):
        return None
    calls = median(run.decode_tokens_s / rate for run, rate in pairs)
    return {"decode_calls": round(calls, 4), "all": round(median(run.tokens_s / rate for run, rate in pairs), 4)}


def _middle(runs: Sequence[Batched]) -> Batched:
    """The run in the middle: its shares belong together, as medians of each alone would not."""
    return sorted(runs, key=lambda run: run.tokens_s)[len(runs) // 2]


def ceiling_text(results: Results) -> str:
    """What the machine can do and what the model needs, before anything is run."""
    machine, c = results.machine, _ceiling(results)
    rates = f"reads {machine.read_bytes_s / 1e9:.1f} GB/s, copies {machine.copy_bytes_s / 1e9:.1f} GB/s"
    step = f"{c['decode_step_bytes'] / 1e6:.1f} MB read, {c['decode_step_ops'] / 1e6:.1f} M operations"
    lines = [
        f"machine: {rates} ({machine.threads} threads), float32 matrices at {machine.matrix_ops_s / 1e9:.0f} GFLOP/s",
        f"a decode step: {step}, at least {c['decode_step_ms']:.2f} ms",
        f"a prompt token: {c['prefill_token_ops'] / 1e6:.1f} M operations, at least {c['prefill_token_ms']:.3f} ms",
    ]
    if c["encode_ops"] is not None:
        lines.append(f"a picture: {c['encode_ops'] / 1e9:.1f} G operations to encode, at least {c['encode_ms']:.1f} ms")
    return "\n".join(lines)


def as_text(results: Results) -> str:
    """The tables of what was measured."""
    lines = [f"{'':8} {'total':>9} {'first token':>12} {'slowest':>9} {'a token':>9} {'pause':>9} {'of ceiling':>10}"]
    for measured in results.workloads:
        found = _workload(results, measured)
        name, middle = measured.workload.name, measured.median
        if middle is None:
            lines.append(f"{name:8} void: {measured.void}")
            continue
        lines.append(
            f"{name:8} {middle.total_s:7.2f} s {middle.first_token_ms:9.0f} ms {middle.first_token_max_ms:6.0f} ms"
            f" {middle.token_ms:6.1f} ms {middle.longest_pause_ms:6.0f} ms {found['share_of_ceiling']:10.0%}"
        )
    lines += [f"  {m.workload.name}: {m.workload.title}" for m in results.workloads]
    if results.peers:
        lines.append(compare_text(results.sides))
    for name, batched in (("plain", results.plain), ("JSON schema", results.schema)):
        if batched:
            lines.append(_batched_text(name, _middle(batched)))
    cost = schema_cost(results)
    if cost is not None:
        lines.append(f"  schemas cost {cost:.1%} of the plain rate")
    shares = _of_batched_bench(results) if results.batched_bench else None
    if shares is not None:
        flash = {None: "its own flash attention", True: "flash attention", False: "no flash attention"}
        lines.append(
            f"  of llama-batched-bench's {median(results.batched_bench):.1f} token/s"
            f" with {flash[results.batched_bench_flash]}:"
            f" the decode calls {shares['decode_calls']:.1%}, all {shares['all']:.1%}"
        )
    return "\n".join(lines)


def _batched_text(name: str, batched: Batched) -> str:
    if batched.void is not None:
        return f"{batched.sequences} sequences, {name}: void: {batched.void}"
    return (
        f"{batched.sequences} sequences, {name}: {batched.tokens_s:.1f} token/s,"
        f" the decode calls alone {batched.decode_tokens_s:.1f} token/s; of a step {batched.decode_share:.1%} decode,"
        f" {batched.sample_share:.1%} sampling, {batched.python_share:.1%} Python"
    )


def _ceiling(results: Results) -> dict[str, Any]:
    """Of one sequence without context, in bytes, operations and milliseconds."""
    machine, cost = results.machine, results.cost
    encode = cost.encode_ops
    return {
        "decode_step_bytes": cost.decode_bytes([0]),
        "decode_step_ops": cost.decode_ops(0),
        "decode_step_ms": _ms(cost.step_seconds(machine, [0])),
        "prefill_token_ops": cost.prefill_ops(0),
        "prefill_token_ms": _ms(cost.prompt_seconds(machine, 1)),
        "encode_ops": encode,
        "encode_ms": None if encode is None else _ms(encode / machine.matrix_ops_s),
    }


def _workload(results: Results, measured: Measured) -> dict[str, Any]:
    """A workload's medians, its runs, and how near they come to what the machine allows.

    The shares compare least times with those measured, so 1 is the ceiling; `first_token_share` is of a single new
    picture, and left out where several wait for each other.
    """
    row = workload_row(measured)
    middle = measured.median
    if middle is None:
        return row
    machine, cost = results.machine, results.cost
    least = cost.workload_seconds(machine, measured.workload, measured.usages)
    row |= {"least_s": round(least, 4), "share_of_ceiling": round(least / middle.total_s, 4)}
    if not measured.workload.at_once:
        usage = measured.usages[0]
        context = usage.prompt_tokens + usage.completion_tokens // 2
        row["token_share"] = _share(cost.step_seconds(machine, [context]), middle.token_ms)
        if measured.workload.pictures == len(measured.workload.asks):
            first = cost.prompt_seconds(machine, usage.prompt_tokens, pictures=1)
            row["first_token_share"] = _share(first, middle.first_token_ms)
    return row


def _share(least_s: float, measured_ms: float) -> float | None:
    return round(least_s * 1e3 / measured_ms, 4) if measured_ms > 0 else None


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
