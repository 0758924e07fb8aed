"""`opsin bench`: measure this machine and this engine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.console import say

if TYPE_CHECKING:
    from opsin.bench.report import Results
    from opsin.compose import Runtime

app = typer.Typer(
    help="Measure the engine against the limits of this machine.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def bench() -> None:
    """Measure the engine against the limits of this machine."""


@app.command()
def engine(
    *,
    model: o.Model = None,
    mmproj: o.Mmproj = None,
    ctx: o.Ctx = 8192,
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=256, help="answers at the same time")] = 8,
    gpu_layers: o.GpuLayers = None,
    device: o.Device = None,
    mmproj_device: o.MmprojDevice = None,
    threads: o.Threads = None,
    threads_batch: o.ThreadsBatch = None,
    kv_type: o.KvType = None,
    workloads: Annotated[
        str | None, typer.Option("--workloads", help="W1 to W5, with commas between; none: all")
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="runs of each workload; medians are shown")] = 3,
    batched: Annotated[bool, typer.Option("--batched/--no-batched", help="measure the decode of full batches")] = True,
    json_out: Annotated[
        Path | None, typer.Option("--json-out", help="write the JSON document to this file too")
    ] = None,
    verbose: o.Verbose = False,
) -> None:
    """Measure the machine, then five workloads on the engine in this process.

    The last line of standard output is one JSON document.
    """
    from opsin.api import checked
    from opsin.bench import choose, measure_machine, read_cost
    from opsin.bench.report import Results, ceiling_text
    from opsin.compose import open_runtime
    from opsin.core.settings import EngineSettings
    from opsin.models import resolve

    chosen = choose(None if workloads is None else workloads.split(","))
    options = o.given(
        ctx=ctx,
        parallel=parallel,
        gpu_layers=gpu_layers,
        device=device,
        mmproj_device=mmproj_device,
        threads=threads,
        threads_batch=threads_batch,
        kv_type=kv_type,
    )
    # What a run writes to disk would make the next one's pictures known.
    settings = checked(EngineSettings, {**options, "verbose": verbose, "disk_cache": False})
    pair = resolve(model, mmproj)
    say("measuring the machine")
    machine = measure_machine(threads or os.cpu_count() or 1)
    cost = read_cost(pair.llm, pair.mmproj, settings.kv_type)
    typer.echo(ceiling_text(Results({}, machine, cost)))
    runtime = open_runtime(model, mmproj, settings)
    try:
        results = _run(runtime, Results(_about(runtime, options), machine, cost), chosen, runs, batched=batched)
    finally:
        runtime.close()
    _print(results, json_out)


def _about(runtime: Runtime, options: dict[str, Any]) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    from opsin import __version__

    limits = runtime.engine.limits
    sizes = {"ctx": limits.n_ctx, "ubatch": limits.n_ubatch}
    return {
        "opsin": __version__,
        "kind": "engine",
        "llama_cpp_python": version("llama-cpp-python"),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "model": runtime.engine.info.as_dict(),
        "settings": {**options, **sizes},
    }


def _run(runtime: Runtime, results: Results, chosen: Any, runs: int, *, batched: bool) -> Results:
    from dataclasses import replace

    from opsin.bench import EngineDriver, measure_workload
    from opsin.bench.batched import SCHEMA, measure_batched
    from opsin.bench.measure import warm_up

    driver = EngineDriver(runtime.engine, runtime.prompts)
    say("warming up")
    warm_up(driver, chosen[0])
    measured = [measure_workload(driver, workload, runs=runs, tell=say) for workload in chosen]
    results = replace(results, workloads=tuple(measured))
    if not batched:
        return results
    sequences = min(8, results.about["settings"]["parallel"])
    say(f"{sequences} sequences in one batch")
    found = {
        schema: [
            measure_batched(runtime.engine, runtime.prompts, sequences=sequences, schema=schema) for _ in range(runs)
        ]
        for schema in (None, SCHEMA)
    }
    # The run in the middle: its shares belong together, as medians of each alone would not.
    middle = {schema: sorted(of, key=lambda one: one.tokens_s)[len(of) // 2] for schema, of in found.items()}
    return replace(results, plain=middle[None], schema=middle[SCHEMA])


def _print(results: Results, json_out: Path | None) -> None:
    from opsin.bench.report import as_document, as_text
    from opsin.core.errors import BadParameter

    document = as_document(results)
    if json_out is not None:
        try:
            json_out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise BadParameter(f"{json_out} cannot be written: {error.strerror or error}.") from error
    typer.echo(as_text(results))
    typer.echo(json.dumps(document))
    if any(measured.void is not None for measured in results.workloads):
        raise typer.Exit(1)
