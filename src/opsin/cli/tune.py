"""`opsin tune`: measure settings on this machine, and write those that are faster to opsin.toml."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.console import say
from opsin.compose import gpu_names, open_runtime
from opsin.core.config import FILE, config_path, read_config, same_file
from opsin.core.errors import BadParameter, OpsinError
from opsin.core.settings import EngineSettings
from opsin.models import Pair, locate, resolve
from opsin.tune.measure import Report, Target, Tuner, candidates
from opsin.tune.opsin_toml import check_target, read_tuned, tuned_table, write_tuned
from opsin.tune.projector import TYPES, convert_projector, default_folder, keep


@o.flags_of(EngineSettings, *o.PAIR, parallel="8")
def tune(
    *,
    profile: Annotated[Target | None, typer.Option(help="one question alone, or many [default: by the device]")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="stop measuring after this many minutes")] = 10.0,
    out: Annotated[Path | None, typer.Option(help="file to write [default: the opsin.toml in force]")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite a foreign file, or another model's")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be written, and write nothing")] = False,
    json_out: o.JsonOut = None,
    **flags: Any,
) -> None:
    """Measure settings on this machine, and write those that are faster to opsin.toml.

    Settings that a flag, the environment or the file itself gives are left alone. Without --profile it is throughput on
    CUDA, else interactive.
    """
    on_cuda = any(name.startswith("CUDA") for name in gpu_names())
    target = profile or ("throughput" if on_cuda else "interactive")
    out = out or config_path(os.environ, Path.cwd()) or Path(FILE)
    chosen = o.given(EngineSettings, flags)
    settings, fixed = _untuned(chosen, out)
    pair = resolve(settings.model, settings.mmproj)
    if pair.mmproj is None:
        raise BadParameter("There is no vision encoder to tune: give the model's projector with --mmproj.")
    # Links are kept: behind them are names (of a split model's parts, too) that mean nothing.
    pair = replace(pair, llm=pair.llm.absolute(), mmproj=pair.mmproj.absolute())
    if not dry_run:
        check_target(out, pair.llm, force=force)
    settings = settings.model_copy(update={"model": pair.llm, "mmproj": pair.mmproj, "disk_cache": False})
    folder = default_folder().with_name(f"tune-{os.getpid()}")  # on the disk where a conversion may stay
    try:
        report = _measured(settings, fixed, target, folder, minutes)
        typer.echo(report.as_text())
        o.write_out(json_out, report.as_document())
        # What shaped the measurement belongs to what was measured.
        shaped = {name: chosen[name] for name in sorted(chosen.keys() - {"model", "mmproj", "verbose"})}
        _save(report, pair, {"parallel": settings.parallel, **shaped}, out, dry_run=dry_run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _untuned(flags: dict[str, Any], out: Path) -> tuple[EngineSettings, set[str]]:
    """The settings without what was tuned before, and the names of those that somebody chose."""
    # A file that is not there, or foreign and to be replaced, does not make another one count.
    file, environ = None if read_tuned(out) is None else out, {**os.environ, "XDG_CONFIG_HOME": os.devnull}
    found = read_config(flags, environ, Path(os.devnull), file=file, locate=locate, tuned=False)
    chosen = {name for name, origin in found.origins.items() if origin != "default"} - {"model", "mmproj"}
    return found.engine(parallel=8), chosen


def _measured(settings: EngineSettings, fixed: set[str], target: Target, folder: Path, minutes: float) -> Report:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tuner = Tuner(lambda one: open_runtime(one.model, one.mmproj, one), settings, target, minutes, say)
    return tuner.run(candidates(settings, fixed, cores, _projectors(settings, folder)))  # conversions take time, too


def _projectors(settings: EngineSettings, folder: Path) -> Iterator[Path]:
    """The projector in other types, where it has matrices to convert."""
    assert settings.mmproj is not None, "set from a pair that has one"
    for kind in TYPES:
        say(f"writing {settings.mmproj.name} as {kind}")
        try:
            made = convert_projector(settings.mmproj, kind, folder)
        except OpsinError as error:  # a disk without room leaves the other candidates
            say(str(error))
            continue
        if made is not None:
            yield made


def _save(report: Report, pair: Pair, settings: dict[str, Any], out: Path, *, dry_run: bool) -> None:
    """Print or write what was recommended; where nothing won, remove what an earlier run wrote for this model."""
    if report.best is None:
        before = None if dry_run else read_tuned(out)
        if before and same_file(before["model"], pair.llm):
            write_tuned(out, "")
            say(f"The table [tuned] was removed from {out}.")
        return
    settings = {**settings, **report.best.changes}
    if (made := report.best.changes.get("mmproj")) is not None:
        settings["mmproj"] = default_folder() / made.name if dry_run else keep(made)
    remarks = [
        "Written by `opsin tune`, and replaced by the next one; settings above this table win over it.",
        f"For {report.target}: {report.best.ratio:.3f} of the time without it.",
    ]
    table = tuned_table(pair.llm, pair.mmproj, settings, remarks)
    if dry_run:
        typer.echo(f"\n{table}")
    else:
        write_tuned(out, table)
        say(f"written: {out}")
