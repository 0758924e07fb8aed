"""`opsin bench`: measure this machine, this engine, and servers."""

import json
import os
import platform
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from opsin import __version__
from opsin.bench.cost import Ceiling, read_cost
from opsin.bench.drivers import HttpDriver, engine_driver, serving
from opsin.bench.report import Limits, Target, as_text, ratios, target_document
from opsin.bench.workloads import TOKENS, Workload, choose, measure_in_turn, warm_up
from opsin.cli import options as o
from opsin.cli.console import new_app, say
from opsin.compose import Runtime, measured_device, open_runtime
from opsin.core.config import read_config
from opsin.core.errors import BadParameter
from opsin.core.files import read_text
from opsin.core.settings import EngineSettings
from opsin.models import locate, resolve

Workloads = Annotated[str | None, typer.Option("--workloads", help="some of W1 to W5, separated by commas")]
Tokens = Annotated[int, typer.Option("--tokens", min=2, help="tokens of an answer of W1 to W4")]
Questions = Annotated[int, typer.Option("--questions", min=2, max=256, help="questions of W3")]
Runs = Annotated[int, typer.Option("--runs", min=1, help="runs of each measurement; medians are shown")]

OWN_SERVER = "opsin-http"

app = new_app("Measure the engine against the limits of this machine, and against servers.")


@app.command(cls=o.GroupedCommand)
@o.flags_of(EngineSettings, *o.ENGINE, parallel="8")
def engine(
    *,
    workloads: Workloads = None,
    tokens: Tokens = TOKENS,
    questions: Questions = 8,
    runs: Runs = 3,
    against: Annotated[list[str] | None, typer.Option(help="URL, NAME=URL, or opsin-http for opsin serve")] = None,
    json_out: o.JsonOut = None,
    settings_file: Annotated[Path | None, typer.Option("--settings", help="read this opsin.toml, no other")] = None,
    config: Annotated[bool, typer.Option("--config/--no-config", help="read opsin.toml and OPSIN_ variables")] = True,
    **flags: Any,
) -> None:
    """Measure the machine, then five workloads on the engine in this process.

    Settings can also be given in opsin.toml or as OPSIN_* environment variables; the context is 8192 unless it is set.
    The last line of standard output is one JSON document.
    """
    chosen = choose(None if workloads is None else workloads.split(","), tokens, questions)
    settings = _settings(o.given(EngineSettings, flags), settings_file, config=config)
    with ExitStack() as stack:
        urls = [
            f"{OWN_SERVER}={stack.enter_context(serving(settings))[1]}" if server == OWN_SERVER else server
            for server in against or ()
        ]
        servers = _servers(urls, "opsin")
        limits = _limits(settings)
        typer.echo(limits.text())
        runtime = stack.enter_context(closing(open_runtime(settings.model, settings.mmproj, settings)))
        about = _about(runtime, settings)
        targets = _measure({"opsin": engine_driver(runtime.engine, runtime.prompts), **servers}, chosen, runs)
    document = {**about, **limits.document(), **target_document(targets[0], limits)}
    if servers:
        document["peers"] = {target.name: target_document(target) for target in targets[1:]}
        document["ratios"] = ratios(targets)
    _print(as_text(targets, limits), document, json_out, targets)


@app.command("http", cls=o.GroupedCommand)
def http_servers(
    urls: Annotated[list[str], typer.Argument(help="URL or NAME=URL of OpenAI-compatible vision servers")],
    *,
    served_model: Annotated[str | None, typer.Option(help="the model's name there (default: the first listed)")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="file with the servers' key")] = None,
    workloads: Workloads = None,
    tokens: Tokens = TOKENS,
    questions: Questions = 8,
    runs: Runs = 3,
    json_out: o.JsonOut = None,
) -> None:
    """Measure servers with the five workloads, in turn, and compare the first with the others.

    The last line of standard output is one JSON document. If a server's answers fail or differ in length from what was
    asked for, its figures are left out and the command ends with 1.
    """
    chosen = choose(None if workloads is None else workloads.split(","), tokens, questions)
    key = None if api_key_file is None else read_text(api_key_file, 4096).strip()
    targets = _measure(_servers(urls, model=served_model, api_key=key), chosen, runs)
    found = {target.name: target_document(target) for target in targets}
    _print(as_text(targets), {"kind": "http", "servers": found, "ratios": ratios(targets)}, json_out, targets)


def _servers(given: list[str], *taken: str, **options: Any) -> dict[str, HttpDriver]:
    """By name: NAME=URL, or a URL which is then its own name."""
    servers: dict[str, HttpDriver] = {}
    for text in given:
        name, equals, url = text.partition("=")
        if not equals or "/" in name:
            name = url = text
        if name in servers or name in taken:
            raise BadParameter(f"The name {name!r} is taken: give each server its own.")
        servers[name] = HttpDriver(url, **options)
    return servers


def _settings(flags: dict[str, Any], file: Path | None, *, config: bool) -> EngineSettings:
    """The engine's settings from all their places, or from the flags alone; with the files of the pair."""
    nowhere = {"XDG_CONFIG_HOME": os.devnull}
    environ, folder = (os.environ, Path.cwd()) if config else (nowhere, Path(os.devnull))
    settings = read_config(flags, environ, folder, file=file, locate=locate).engine(ctx=8192, parallel=8)
    pair = resolve(settings.model, settings.mmproj)
    mmproj = settings.mmproj if pair.mmproj is None else pair.mmproj.resolve()
    # Embeddings on disk would make the next run's images known.
    return settings.model_copy(update={"model": pair.llm.resolve(), "mmproj": mmproj, "disk_cache": False})


def _limits(settings: EngineSettings) -> Limits:
    say("measuring the device")
    device, rate = measured_device()
    assert settings.model is not None
    cost = read_cost(settings.model, settings.mmproj, settings.kv_type)
    return Limits(Ceiling(device.name, read_bytes_s=rate.bytes_s, matrix_ops_s=rate.ops_s), cost)


def _about(runtime: Runtime, settings: EngineSettings) -> dict[str, Any]:
    limits = runtime.engine.limits
    chosen = settings.model_dump(mode="json", exclude_unset=True, exclude={"model", "mmproj", "disk_cache", "verbose"})
    return {
        "opsin": __version__,
        "kind": "engine",
        "llama_cpp_python": version("llama-cpp-python"),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "model": runtime.engine.info.as_dict(),
        "settings": {**chosen, "n_ctx": limits.n_ctx, "ubatch": limits.n_ubatch},
    }


def _measure(drivers: dict[str, Any], chosen: tuple[Workload, ...], runs: int) -> list[Target]:
    """Every workload on every driver in turn, after a warm-up of each."""
    say("warming up")
    for driver in drivers.values():
        warm_up(driver, chosen[0])
    found = [measure_in_turn(drivers, workload, runs=runs, tell=say) for workload in chosen]
    return [Target(name, _about_server(drivers[name]), [results[name] for results in found]) for name in drivers]


def _about_server(driver: Any) -> dict[str, str]:
    if not isinstance(driver, HttpDriver):
        return {}
    # llama-server names its model by the whole path of its file, which does not belong in a shared result.
    return {"url": driver.url, "model": Path(driver.model).name if Path(driver.model).is_absolute() else driver.model}


def _print(text: str, document: dict[str, Any], json_out: Path | None, targets: list[Target]) -> None:
    """Text, then the document in one line; ends with 1 if a result is invalid."""
    o.write_out(json_out, document)
    typer.echo(text)
    typer.echo(json.dumps(document))
    if any(result.invalid is not None for target in targets for result in target.results):
        raise typer.Exit(1)
