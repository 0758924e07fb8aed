"""`opsin tune`: measure settings on this machine, and write those that win to opsin.toml."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.console import say

if TYPE_CHECKING:
    from opsin.compose import Runtime
    from opsin.core.backend import Backend
    from opsin.core.settings import EngineSettings, Profile
    from opsin.engine import Engine
    from opsin.models import Pair
    from opsin.prompt import PromptBuilder
    from opsin.tune.pareto import Point
    from opsin.tune.session import Report

_CTX = 2048  # tokens a sequence, where nobody chose: two engines are open at the same time
PARALLEL = 8


def tune(
    *,
    model: o.Model = None,
    mmproj: o.Mmproj = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="what to favour: interactive or throughput; none: by the devices")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="longest time to measure")] = 10.0,
    out: Annotated[Path, typer.Option("--out", help="file to write")] = Path("opsin.toml"),
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
    runs: Annotated[int, typer.Option("--runs", min=1, help="with --check: runs of each workload")] = 5,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, max=256, help="answers at the same time [default: 8]")
    ] = None,
    ctx: o.Ctx = None,
    gpu_layers: o.GpuLayers = None,
    device: o.Device = None,
    mmproj_device: o.MmprojDevice = None,
    kv_type: o.KvType = None,
    verbose: o.Verbose = False,
) -> None:
    """Measure settings on this machine, and write those that win to opsin.toml.

    Settings that a flag, the environment or the file itself gives are left alone.
    """
    flags = o.given(
        model=model,
        mmproj=mmproj,
        parallel=parallel,
        ctx=ctx,
        gpu_layers=gpu_layers,
        device=device,
        mmproj_device=mmproj_device,
        kv_type=kv_type,
        verbose=verbose or None,
    )
    if check:
        _check(flags, out, runs, json_out)
        return
    from opsin.tune.toml import check_target

    if not dry_run:
        check_target(out, None, force=force)
    settings, fixed = _untuned(flags, out)
    pair = _pair(settings)
    if not dry_run:
        check_target(out, pair.llm.resolve(), force=force)
    files = {"model": pair.llm.resolve(), "mmproj": pair.mmproj and pair.mmproj.resolve()}
    settings = settings.model_copy(update=files)
    favoured = _favoured(profile, settings)
    fixed |= set() if convert else {"mmproj"}
    report = _measured(settings, fixed, favoured, minutes, allow_approximate=allow_approximate)
    typer.echo(_text(report))
    _put(report, pair, {"parallel": parallel} if parallel else {}, out, dry_run=dry_run)
    _save(plot, json_out, report)


def _favoured(profile: str | None, settings: EngineSettings) -> Profile:
    from opsin.compose import default_profile
    from opsin.core.errors import BadParameter

    if profile not in {None, "interactive", "throughput"}:
        raise BadParameter(f"--profile is interactive or throughput, not {profile}.")
    if profile is not None:
        return "throughput" if profile == "throughput" else "interactive"
    return settings.profile or default_profile()


def _put(report: Report, pair: Pair, more: dict[str, Any], out: Path, *, dry_run: bool) -> None:
    """Print or write what was picked; where nothing won, take away what an earlier run wrote for this model."""
    from opsin.core.config import read_file
    from opsin.tune.toml import tuned_table, write_tuned

    model, mmproj = pair.llm.resolve(), pair.mmproj and pair.mmproj.resolve()
    table = tuned_table(model, mmproj, {**report.settings, **more}, _remarks(report))
    if dry_run:
        typer.echo(table)
    elif report.settings:
        write_tuned(out, table)
        say(f"written: {out}; measure it with: opsin tune --check --out {out}")
    else:
        before = read_file(out)[1] if _is_config(out) else {}
        removed = before.get("model") == str(model) and write_tuned(out, "")
        say(f"The untuned settings are the best that were found{f', so {out} lost its table' if removed else ''}.")


def _untuned(flags: dict[str, Any], out: Path) -> tuple[EngineSettings, set[str]]:
    """The settings without what was tuned before, and the names of those that somebody chose."""
    from opsin.core.config import read_config
    from opsin.models import locate

    # A foreign file that is to be replaced is not read, also where it is the one of this folder.
    file, folder = (out, Path.cwd()) if _is_config(out) else (None, out if out.exists() else Path.cwd())
    found = read_config(flags, os.environ, folder, file=file, locate=locate, tuned=False)
    chosen = {name for name, origin in found.origins.items() if origin != "default"} - {"model", "mmproj"}
    return found.engine(parallel=PARALLEL), chosen


def _is_config(path: Path) -> bool:
    """Whether it is there and an opsin.toml."""
    from opsin.core.config import read_file
    from opsin.core.errors import BadParameter

    try:
        read_file(path)
    except BadParameter:
        return False
    return True


def _pair(settings: EngineSettings) -> Pair:
    from opsin.core.errors import BadParameter
    from opsin.models import resolve

    pair = resolve(*(None if path is None else str(path) for path in (settings.model, settings.mmproj)))
    if pair.mmproj is None:
        raise BadParameter("There is no vision encoder to tune: give the model's projector with --mmproj.")
    return pair


@dataclass(frozen=True, slots=True)
class _Rig:
    """What the engine's room calls a runtime, as tuning wants it."""

    runtime: Runtime
    backend: Backend
    threads: tuple[int, int, int]

    @property
    def engine(self) -> Engine:
        return self.runtime.engine

    @property
    def prompts(self) -> PromptBuilder:
        return self.runtime.prompts

    def close(self) -> None:
        self.runtime.close()


def _open(settings: EngineSettings) -> _Rig:
    from opsin.compose import open_runtime

    runtime = open_runtime(settings.model, settings.mmproj, settings)
    if runtime.backend is None:
        raise AssertionError("an opened runtime has its backend")
    return _Rig(runtime, runtime.backend, runtime.backend.threads)


def _measured(
    settings: EngineSettings, fixed: set[str], profile: Profile, minutes: float, *, allow_approximate: bool
) -> Report:
    from opsin.compose import gpu_names
    from opsin.tune.session import Tuning, Wish

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wish = Wish(
        profile=profile,
        fixed=frozenset(fixed),
        minutes=minutes,
        allow_approximate=allow_approximate,
        cores=cores,
        gpus=gpu_names(),
    )
    with _Bar() as bar:
        return Tuning(_open, settings, wish, tell=bar.tell).run()


class _Bar:
    """A progress bar on standard error; lines where nobody watches. It shows the share of the time that is gone."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._watched = sys.stderr.isatty()
        columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not self._watched)
        self._task = self._progress.add_task("", total=1.0)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def tell(self, text: str, share: float) -> None:
        """What is measured now, and how much of the longest time is over."""
        if self._watched:
            self._progress.update(self._task, completed=share, description=text)
        else:
            say(text)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


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


def _save(plot: Path | None, json_out: Path | None, report: Report) -> None:
    from opsin.tune.picture import plot_svg

    if plot is not None:
        _write(plot, plot_svg(report.points, report.picked))
    if json_out is not None:
        _write(json_out, json.dumps(report.as_document(), indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    from opsin.core.errors import BadParameter

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadParameter(f"{path} cannot be written: {error.strerror or error}.") from error


def _check(flags: dict[str, Any], out: Path, runs: int, json_out: Path | None) -> None:
    """W1 and W4, tuned and untuned in turn; the last line of standard output is one JSON document."""
    from opsin.bench import EngineDriver, choose, measure_in_turn
    from opsin.bench.measure import warm_up
    from opsin.compose import open_runtime
    from opsin.tune.check import check_document, check_text

    sides = _sides(flags, out)
    opened: dict[str, Runtime] = {}
    try:
        for name, settings in sides.items():
            opened[name] = open_runtime(settings.model, settings.mmproj, settings)
        drivers = {name: EngineDriver(runtime.engine, runtime.prompts) for name, runtime in opened.items()}
        chosen = choose(["W1", "W4"])
        for driver in drivers.values():
            warm_up(driver, chosen[0])
        measured = [measure_in_turn(drivers, workload, runs=runs, tell=say) for workload in chosen]
        about = opened["untuned"].engine.info.as_dict()
    finally:
        for runtime in opened.values():
            runtime.close()
    document = check_document(measured, about, {name: _shown(settings) for name, settings in sides.items()})
    if json_out is not None:
        _write(json_out, json.dumps(document, indent=2) + "\n")
    typer.echo(check_text(measured))
    typer.echo(json.dumps(document))


def _sides(flags: dict[str, Any], out: Path) -> dict[str, EngineSettings]:
    from opsin.core.config import TUNED_FROM, read_config, read_file
    from opsin.core.errors import BadParameter
    from opsin.models import locate

    tuned = read_file(out)[1]
    if not tuned:
        raise BadParameter(f"{out} holds nothing that was tuned: write it with `opsin tune`.")
    given = {"model": tuned["model"], **o.given(mmproj=tuned.get(TUNED_FROM, tuned.get("mmproj"))), **flags}
    sides = {}
    for name, wanted in (("untuned", given), ("tuned", {k: v for k, v in given.items() if k != "mmproj"})):
        found = read_config(wanted, os.environ, Path.cwd(), file=out, locate=locate, tuned=name == "tuned")
        if name == "tuned" and not any(origin.startswith("[") for origin in found.origins.values()):
            raise BadParameter(
                f"{out} was tuned for {tuned['model']}, not for {given['model']}: give that or no --model."
            )
        settings = found.engine(parallel=PARALLEL)
        sizes = {"disk_cache": False, "ctx": settings.ctx or _CTX * settings.parallel}
        sides[name] = settings.model_copy(update=sizes)
    return sides


def _shown(settings: EngineSettings) -> dict[str, Any]:
    values = settings.model_dump(mode="json", exclude_unset=True)
    return {name: Path(value).name if name in {"model", "mmproj"} else value for name, value in values.items()}
