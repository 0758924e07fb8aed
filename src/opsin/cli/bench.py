"""`opsin bench`: measure this machine and this engine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.console import say
from opsin.core.settings import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsin.bench import HttpDriver
    from opsin.bench.batched import Batched
    from opsin.bench.compare import Side
    from opsin.bench.report import Results
    from opsin.compose import Runtime

Workloads = Annotated[str | None, typer.Option("--workloads", help="W1 to W5, with commas between; none: all")]
Runs = Annotated[int, typer.Option("--runs", min=1, help="runs of each workload; medians are shown")]
JsonOut = Annotated[Path | None, typer.Option("--json-out", help="write the JSON document to this file too")]

app = typer.Typer(
    help="Measure the engine against the limits of this machine, and against servers.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def bench() -> None:
    """Measure the engine against the limits of this machine, and against servers."""


@app.command()
def engine(
    *,
    model: o.Model = None,
    mmproj: o.Mmproj = None,
    ctx: Annotated[int | None, typer.Option("--ctx", help="context in tokens for all answers [default: 8192]")] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, max=256, help="answers at the same time [default: 8]")
    ] = None,
    gpu_layers: o.GpuLayers = None,
    device: o.Device = None,
    mmproj_device: o.MmprojDevice = None,
    threads: o.Threads = None,
    threads_batch: o.ThreadsBatch = None,
    kv_type: o.KvType = None,
    workloads: Workloads = None,
    runs: Runs = 3,
    batched: Annotated[bool, typer.Option("--batched/--no-batched", help="measure the decode of full batches")] = True,
    batched_bench: Annotated[
        Path | None, typer.Option("--batched-bench", help="a llama-batched-bench to compare full batches with, in turn")
    ] = None,
    batched_bench_flash: Annotated[
        bool | None,
        typer.Option(
            "--batched-bench-flash/--no-batched-bench-flash",
            help="flash attention of that llama-batched-bench; none: its own default, which need not be the engine's",
        ),
    ] = None,
    batched_prompt: Annotated[
        int, typer.Option("--batched-prompt", min=0, help="tokens of each prompt in a full batch (0: a short question)")
    ] = 0,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="NAME=URL of a server with the same model, measured in turn; may be repeated"),
    ] = None,
    json_out: JsonOut = None,
    settings_file: Annotated[
        Path | None, typer.Option("--settings", help="an opsin.toml to read instead of the folder's or the user's")
    ] = None,
    config: Annotated[bool, typer.Option("--config/--no-config", help="read opsin.toml and OPSIN_ variables")] = True,
    verbose: o.Verbose = None,
) -> None:
    """Measure the machine, then five workloads on the engine in this process.

    What no flag says comes from the environment and from opsin.toml, as for `opsin serve`. The last line of standard
    output is one JSON document.
    """
    flags = o.fields_of(EngineSettings, locals())
    from opsin.bench import choose, measure_machine, read_cost
    from opsin.bench.report import Results, ceiling_text
    from opsin.compose import open_runtime
    from opsin.core.errors import BadParameter
    from opsin.models import resolve

    chosen = choose(None if workloads is None else workloads.split(","))
    settings = _settings(flags, settings_file, config=config)
    if batched_bench is not None and not batched:
        raise BadParameter("--batched-bench compares full batches, which --no-batched leaves out: give one of them.")
    if batched_bench_flash is not None and batched_bench is None:
        raise BadParameter("--batched-bench-flash is about the program that --batched-bench names: give that, too.")
    pair = resolve(*(None if path is None else str(path) for path in (settings.model, settings.mmproj)))
    peers = _peers(against or [])
    say("measuring the machine")
    machine = measure_machine(settings.threads or os.cpu_count() or 1)
    cost = read_cost(pair.llm, pair.mmproj, settings.kv_type)
    typer.echo(ceiling_text(Results({}, machine, cost)))
    runtime = open_runtime(pair.llm, pair.mmproj, settings)
    try:
        results = Results(_about(runtime, settings), machine, cost, batched_bench_flash=batched_bench_flash)
        results = _run(runtime, results, chosen, runs, peers)
        if batched:
            results = _batches(
                runtime,
                results,
                runs,
                batched_prompt,
                _batched_peer(batched_bench, pair.llm, runtime, settings.threads, batched_bench_flash),
            )
    finally:
        runtime.close()
    _print(results, json_out)


@app.command()
def http(
    urls: Annotated[list[str], typer.Argument(help="URL or NAME=URL of OpenAI-compatible vision servers")],
    *,
    served_model: Annotated[
        str | None, typer.Option("--served-model", help="the model's name there; none: the first it lists")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", help="file with the servers' key")] = None,
    workloads: Workloads = None,
    runs: Runs = 3,
    json_out: JsonOut = None,
) -> None:
    """Measure servers with five workloads, in turn; the first is compared with the others.

    The last line of standard output is one JSON document. A server whose answers fail, or have another length than
    asked for, has no figures, and the command ends with 1.
    """
    from opsin.bench import HttpDriver, choose
    from opsin.bench.compare import compare_text, ratios, side_document
    from opsin.core.errors import BadParameter

    chosen = choose(None if workloads is None else workloads.split(","))
    key = _key(api_key_file)
    drivers: dict[str, HttpDriver] = {}
    for given in urls:
        name, equals, url = given.partition("=")
        if not equals or "/" in name:
            name = url = given
        if name in drivers:
            raise BadParameter(f"{name} is given twice.")
        drivers[name] = HttpDriver(url, model=served_model, api_key=key)
    sides = _in_turn(drivers, chosen, runs)
    document = {"kind": "http", "servers": {side.name: side_document(side) for side in sides}, "ratios": ratios(sides)}
    _tell(compare_text(sides), document, json_out)
    if any(measured.void is not None for side in sides for measured in side.workloads):
        raise typer.Exit(1)


def _key(path: Path | None) -> str | None:
    from opsin.core.errors import BadParameter

    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BadParameter(f"{path} cannot be read: {error.strerror or error}.") from error


def _settings(flags: dict[str, Any], file: Path | None, *, config: bool) -> EngineSettings:
    """The engine's settings as this command takes them, from all their places or from the flags alone."""
    from opsin.core.config import read_config
    from opsin.core.errors import BadParameter
    from opsin.models import locate

    if file is not None and not config:
        raise BadParameter("--settings names a file to read, and --no-config says to read none: give one of them.")
    nowhere = {"XDG_CONFIG_HOME": os.devnull}
    environ, folder = (os.environ, Path.cwd()) if config else (nowhere, Path(os.devnull))
    found = read_config(flags, environ, folder, file=file, locate=locate).engine(ctx=8192, parallel=8)
    # What a run writes to disk would make the next one's pictures known.
    return found.model_copy(update={"disk_cache": False})


def _about(runtime: Runtime, settings: EngineSettings) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    from opsin import __version__

    limits = runtime.engine.limits
    left_out = {"model", "mmproj", "disk_cache", "verbose"}
    chosen = settings.model_dump(mode="json", exclude_unset=True, exclude=left_out)
    sizes = {"n_ctx": limits.n_ctx, "ctx_of_each": limits.n_ctx_seq, "ubatch": limits.n_ubatch}
    return {
        "opsin": __version__,
        "kind": "engine",
        "llama_cpp_python": version("llama-cpp-python"),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "model": runtime.engine.info.as_dict(),
        "settings": {**chosen, **sizes},
    }


def _run(runtime: Runtime, results: Results, chosen: Any, runs: int, peers: dict[str, HttpDriver]) -> Results:
    from dataclasses import replace

    from opsin.bench import EngineDriver

    ours, *theirs = _in_turn({"opsin": EngineDriver(runtime.engine, runtime.prompts), **peers}, chosen, runs)
    return replace(results, workloads=ours.workloads, peers=tuple(theirs))


def _batches(
    runtime: Runtime, results: Results, runs: int, prompt_tokens: int, peer: Callable[[Batched], float] | None
) -> Results:
    """Full batches, plain and with schemas, and llama.cpp's own, in turn; every second run begins with the schemas."""
    from dataclasses import replace
    from functools import partial

    from opsin.bench.batched import SCHEMA, measure_batched

    sequences = min(8, results.about["settings"]["parallel"])
    measure = partial(
        measure_batched, runtime.engine, runtime.prompts, sequences=sequences, prompt_tokens=prompt_tokens
    )
    plain: list[Batched] = []
    schema: list[Batched] = []
    rates: list[float] = []
    for run in range(runs):
        say(f"{sequences} sequences in one batch, run {run + 1} of {runs}")
        for text in (None, SCHEMA) if run % 2 == 0 else (SCHEMA, None):
            (schema if text else plain).append(measure(schema=text))
        rates += [] if peer is None else [peer(plain[-1])]
    return replace(results, plain=tuple(plain), schema=tuple(schema), batched_bench=tuple(rates))


def _batched_peer(
    program: Path | None, llm: Path, runtime: Runtime, threads: int | None, flash: bool | None
) -> Callable[[Batched], float] | None:
    """What measures llama.cpp's own program in this engine's sizes."""
    if program is None:
        return None
    from opsin.bench.batched import TOKENS
    from opsin.bench.batched_peer import measure_peer

    limits = runtime.engine.limits
    return lambda ours: measure_peer(
        program,
        llm,
        sequences=ours.sequences,
        prompt=ours.prompt_tokens,
        tokens=TOKENS,
        threads=threads or os.cpu_count() or 1,
        n_ctx_seq=limits.n_ctx_seq if not limits.shared else limits.n_ctx // ours.sequences,
        shared=limits.shared,
        flash=flash,
    )


def _peers(given: list[str]) -> dict[str, HttpDriver]:
    from opsin.bench import HttpDriver
    from opsin.core.errors import BadParameter

    peers: dict[str, HttpDriver] = {}
    for peer in given:
        name, equals, url = peer.partition("=")
        if not equals or not name or name in {"opsin", *peers}:
            raise BadParameter(f"--against takes NAME=URL with a name of its own, not {peer!r}.")
        peers[name] = HttpDriver(url)
    return peers


def _in_turn(drivers: dict[str, Any], chosen: Any, runs: int) -> list[Side]:
    """Every workload on every driver in turn, after a warm-up of each."""
    from opsin.bench import measure_in_turn
    from opsin.bench.compare import Side
    from opsin.bench.measure import warm_up

    say("warming up")
    for driver in drivers.values():
        warm_up(driver, chosen[0])
    found = [measure_in_turn(drivers, workload, runs=runs, tell=say) for workload in chosen]
    return [Side(name, _about_peer(d), tuple(workload[name] for workload in found)) for name, d in drivers.items()]


def _about_peer(driver: Any) -> dict[str, str]:
    if not hasattr(driver, "url"):
        return {}
    # llama-server names its model by the file's whole path, which is nobody's business in a shared result.
    model = Path(driver.model).name if Path(driver.model).is_absolute() else driver.model
    return {"url": driver.url, "model": model}


def _print(results: Results, json_out: Path | None) -> None:
    from opsin.bench.report import as_document, as_text

    _tell(as_text(results), as_document(results), json_out)
    if any(measured.void is not None for side in results.sides for measured in side.workloads):
        raise typer.Exit(1)


def _tell(text: str, document: dict[str, Any], json_out: Path | None) -> None:
    if json_out is not None:
        o.write_out(json_out, json.dumps(document, indent=2) + "\n")
    typer.echo(text)
    typer.echo(json.dumps(document))
