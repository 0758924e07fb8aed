"""`opsin tune`: measure settings on this machine, and write those that win to opsin.toml."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from opsin.cli import options as o
from opsin.cli.console import say
from opsin.core.settings import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opsin.core.settings import Profile
    from opsin.models import Pair
    from opsin.tune.pareto import Point
    from opsin.tune.rig import Rig
    from opsin.tune.session import Report
    from opsin.tune.space import Wish

PARALLEL = 8


def tune(
    *,
    model: o.Model = None,
    mmproj: o.Mmproj = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="what to favour: interactive or throughput; none: by the devices")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="longest time to measure")] = 10.0,
    out: Annotated[
        Path | None, typer.Option("--out", help="file to write; none: the opsin.toml in force, or a new one here")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="write over a file that is no opsin.toml of this model")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be written, and write nothing")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="draw latency against throughput into this SVG file")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json-out", help="write all that was measured to this file")
    ] = None,
    allow_approximate: Annotated[
        bool, typer.Option("--allow-approximate", help="take also what changes answers beyond the tolerance")
    ] = False,
    convert: Annotated[
        bool, typer.Option("--convert/--no-convert", help="try the projector in other types (bf16, q8_0)")
    ] = True,
    check: Annotated[
        bool, typer.Option("--check", help="measure the file that was written: W1 and W4 with it and without, in turn")
    ] = False,
    runs: Annotated[int, typer.Option("--runs", min=2, help="with --check: runs of each workload")] = 5,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, max=256, help="answers at the same time [default: 8]")
    ] = None,
    ctx: o.Ctx = None,
    gpu_layers: o.GpuLayers = None,
    device: o.Device = None,
    mmproj_device: o.MmprojDevice = None,
    kv_type: o.KvType = None,
    verbose: o.Verbose = None,
) -> None:
    """Measure settings on this machine, and write those that win to opsin.toml.

    Settings that a flag, the environment or the file itself gives are left alone.
    """
    flags = o.fields_of(EngineSettings, {**locals(), "profile": None})
    from opsin.compose import gpu_names
    from opsin.core.config import FILE, config_path
    from opsin.tune.picture import plot_svg
    from opsin.tune.projector import default_folder
    from opsin.tune.space import Wish
    from opsin.tune.toml import check_target

    out = out or config_path(os.environ, Path.cwd()) or Path(FILE)
    if check:
        _check(flags, out, runs, json_out)
        return
    if not dry_run:
        check_target(out, None, force=force)
    settings, fixed = _untuned(flags, out)
    pair = _pair(settings)
    if not dry_run:
        check_target(out, pair.llm, force=force)
    settings = settings.model_copy(update={"model": pair.llm, "mmproj": pair.mmproj})
    fixed |= set() if convert else {"mmproj"}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wish = Wish(_favoured(profile, settings), frozenset(fixed), minutes, allow_approximate, cores, gpu_names())
    # What shaped the measurement belongs to what was measured.
    shaped = {name: flags[name] for name in sorted(flags.keys() - {"model", "mmproj", "verbose"})}
    folder = default_folder().with_name(f"tune-{os.getpid()}")  # on the disk where a conversion may stay
    try:
        report = _measured(settings, wish, folder)
        typer.echo(_text(report))
        _put(report, pair, {"parallel": settings.parallel, **shaped}, out, dry_run=dry_run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if plot is not None:
        o.write_out(plot, plot_svg(report.points, report.picked))
    if json_out is not None:
        o.write_out(json_out, json.dumps(report.as_document(), indent=2) + "\n")


def _favoured(profile: str | None, settings: EngineSettings) -> Profile:
    from opsin.compose import default_profile
    from opsin.core.errors import BadParameter

    if profile in {"interactive", "throughput"}:
        return cast("Profile", profile)
    if profile is not None:
        raise BadParameter(f"--profile is interactive or throughput, not {profile}.")
    return settings.profile or default_profile()


def _put(report: Report, pair: Pair, more: dict[str, Any], out: Path, *, dry_run: bool) -> None:
    """Print or write what was picked; where nothing won, take away what an earlier run wrote for this model."""
    from opsin.core.config import same_file
    from opsin.tune.projector import default_folder, keep
    from opsin.tune.toml import read_tuned, tuned_table, write_tuned

    settings, made = {**more, **report.settings}, report.settings.get("mmproj")
    if made is not None:
        settings["mmproj"] = default_folder() / made.name if dry_run else keep(made)
    if report.settings:
        table = tuned_table(pair.llm, pair.mmproj, settings, _remarks(report))
        if dry_run:
            typer.echo(table)
            return
        write_tuned(out, table)
        say(f"written: {out}; measure it with: opsin tune --check --out {out}")
        return
    before = None if dry_run else read_tuned(out)
    removed = bool(before and same_file(before["model"], pair.llm) and write_tuned(out, ""))
    say(f"The untuned settings are the best that were found{f', so {out} lost its table' if removed else ''}.")


def _untuned(flags: dict[str, Any], out: Path) -> tuple[EngineSettings, set[str]]:
    """The settings without what was tuned before, and the names of those that somebody chose."""
    from opsin.core.config import read_config
    from opsin.models import locate
    from opsin.tune.toml import read_tuned

    # Where the file is not there, or foreign and to be replaced, no other one is in force beside it.
    nowhere = Path(os.devnull)
    environ = {**os.environ, "XDG_CONFIG_HOME": os.devnull}
    found = read_config(
        flags, environ, nowhere, file=None if read_tuned(out) is None else out, locate=locate, tuned=False
    )
    chosen = {name for name, origin in found.origins.items() if origin != "default"} - {"model", "mmproj"}
    return found.engine(parallel=PARALLEL), chosen


def _pair(settings: EngineSettings) -> Pair:
    from opsin.core.errors import BadParameter
    from opsin.models import resolve

    pair = resolve(*(None if path is None else str(path) for path in (settings.model, settings.mmproj)))
    if pair.mmproj is None:
        raise BadParameter("There is no vision encoder to tune: give the model's projector with --mmproj.")
    # Links are kept: behind them are names (of a split model's parts, too) that mean nothing.
    return replace(pair, llm=pair.llm.absolute(), mmproj=pair.mmproj.absolute())


def _open(settings: EngineSettings) -> Rig:
    from opsin.compose import open_runtime
    from opsin.tune.rig import Rig

    runtime = open_runtime(settings.model, settings.mmproj, settings)
    if runtime.backend is None:
        raise AssertionError("an opened runtime has its backend")
    return Rig(runtime.engine, runtime.prompts, runtime.backend, runtime.backend.threads, runtime.close)


def _check_room(settings: EngineSettings) -> None:
    """Two engines are open at a time. Raises BadInput where the host has no memory for them, as far as it can tell."""
    from opsin.core.errors import BadInput
    from opsin.doctor.room import host_memory

    if settings.model is None:
        return
    parts, free = host_memory(settings.model, settings.mmproj, settings)
    if free is None:
        return
    needed = 2 * parts.least + parts.mapped  # weights that are mapped are there once
    if needed > free:
        raise BadInput(
            f"Two engines side by side need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: close other "
            "programs, or give a smaller --parallel or --ctx."
        )


def _measured(settings: EngineSettings, wish: Wish, folder: Path) -> Report:
    from opsin.tune.projector import convert_projector
    from opsin.tune.session import Tuning

    convert = partial(convert_projector, folder=folder)
    with _bar() as tell:
        return Tuning(_open, settings, wish, convert, _check_room, tell=tell).run()


@contextmanager
def _bar() -> Iterator[Callable[[str, float], None]]:
    """Shows what is measured and the share of the time that is gone, on standard error; lines where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    watched = sys.stderr.isatty()
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not watched) as progress:
        task = progress.add_task("", total=1.0)
        shown = partial(progress.update, task)
        yield lambda text, share: shown(completed=share, description=text) if watched else say(text)


def _remarks(report: Report) -> list[str]:
    picked = report.picked
    return [
        "Written by `opsin tune`, and written anew by the next one; settings above this table win over it.",
        f"Picked for {report.profile}: {_against(picked)}.",
        *([f"Against the untuned answers: {report.checks}."] if report.checks else []),
    ]


def _against(point: Point) -> str:
    one, many = point.latency, point.batch
    return (
        f"one question takes {one.value:.3f} of the untuned time (±{one.noise:.3f}), "
        f"many at once {many.value:.3f} (±{many.noise:.3f})"
    )


def _text(report: Report) -> str:
    from opsin.tune.picture import plot_text
    from opsin.tune.session import tried_text

    picked = report.picked
    lines = [f"tried ({report.seconds:.0f} s, two measurements of one thing differ by {report.noise:.0%} here):"]
    lines += [f"  {tried_text(tried)}" for tried in report.tried]
    if len(report.points) > 1:
        lines += ["", plot_text(report.points, picked)]
    lines += [f"  note: {note}" for note in report.notes]
    against = "" if picked is report.points[0] else f": {_against(picked)}"
    lines += ["", f"picked for {report.profile}: {picked.name}{against}"]
    if report.checks:
        lines.append(f"answers: {report.checks}")
    return "\n".join(lines)


def _check(flags: dict[str, Any], out: Path, runs: int, json_out: Path | None) -> None:
    """W1 and W4, tuned and untuned in turn; the last line of standard output is one JSON document."""
    from opsin.bench import choose, measure_in_turn
    from opsin.bench.measure import warm_up
    from opsin.compose import gpu_names
    from opsin.tune.check import check_document, check_text
    from opsin.tune.rig import sized
    from opsin.tune.search import plain

    sides = _sides(flags, out)
    base = sized(_open, sides["untuned"], gpus=bool(gpu_names())).settings
    tuned = sides["tuned"]
    layers = base.gpu_layers if tuned.gpu_layers is None else tuned.gpu_layers
    sizes = {"disk_cache": False, "ctx": base.ctx, "gpu_layers": layers}
    sides = {"untuned": base, "tuned": tuned.model_copy(update=sizes)}
    _check_room(base)
    with ExitStack() as stack:
        rigs = {}
        for name, settings in sides.items():
            rigs[name] = _open(settings)
            stack.callback(rigs[name].close)
        drivers = {name: rig.driver for name, rig in rigs.items()}
        chosen = choose(["W1", "W4"])
        for driver in drivers.values():
            warm_up(driver, chosen[0])
        measured = [measure_in_turn(drivers, workload, runs=runs, tell=say) for workload in chosen]
        about = rigs["untuned"].engine.info.as_dict()
    shown = {name: plain(settings.model_dump(exclude_unset=True)) for name, settings in sides.items()}
    document = check_document(measured, about, shown)
    if json_out is not None:
        o.write_out(json_out, json.dumps(document, indent=2) + "\n")
    typer.echo(check_text(measured))
    typer.echo(json.dumps(document))
    if any(row["void"] for row in document["workloads"].values()):
        raise typer.Exit(1)


def _sides(flags: dict[str, Any], out: Path) -> dict[str, EngineSettings]:
    from opsin.core.config import TUNED_FROM, read_config, read_file
    from opsin.core.errors import BadParameter
    from opsin.models import locate

    tuned = read_file(out)[1]
    if not tuned:
        raise BadParameter(f"{out} holds nothing that was tuned: write it with `opsin tune`.")
    # How many answers at the same time, and their context, are no gain or loss: both sides have the same.
    given: dict[str, Any] = {name: tuned[name] for name in ("model", "parallel", "ctx") if name in tuned}
    given = {**given, **o.given(mmproj=tuned.get(TUNED_FROM, tuned.get("mmproj"))), **flags}
    sides = {}
    for name in ("untuned", "tuned"):
        found = read_config(given, os.environ, Path.cwd(), file=out, locate=locate, tuned=name == "tuned")
        if name == "tuned" and not any(origin.startswith("[") for origin in found.origins.values()):
            raise BadParameter(
                f"{out} was tuned for {tuned['model']}, not for {given['model']}: give that or no --model."
            )
        sides[name] = found.engine(parallel=PARALLEL)
    return sides
