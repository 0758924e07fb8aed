"""`opsin batch`: one question about many images, each row exactly once, into one output or beside the images."""

import asyncio
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from opsin.boxes import check_boxes
from opsin.cli import options as o
from opsin.cli.batch_progress import ProgressLine, summary
from opsin.cli.batch_ray import batch_on_ray, refuse
from opsin.cli.console import DEMO, hush, say, tell, working
from opsin.core.config import checked
from opsin.core.errors import BadParameter, OpsinError
from opsin.core.files import expand
from opsin.core.image_options import ImageOptions
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings, ImageSettings, ServerSettings
from opsin.images.fetch import system_addresses
from opsin.jobs.asker import Asker, ImageAsker, Question
from opsin.jobs.item import Item, Source
from opsin.jobs.ledger import Ledger, LedgerBroken, differences, fingerprint
from opsin.jobs.options import BatchOptions
from opsin.jobs.output import ENDINGS, CsvOutput, Output, StoredOutput
from opsin.jobs.report import report_text, write_report
from opsin.jobs.row import Row, output_fields
from opsin.jobs.runner import Run, sample, without_sidecars
from opsin.jobs.sidecar import Kind, sidecar_path, write_sidecar
from opsin.jobs.sources import all_differ, open_source
from opsin.jobs.spec import job_spec
from opsin.jobs.template import PromptTemplate
from opsin.models import resolve
from opsin.prompt import PromptBuilder
from opsin.server.handler import ModelManager
from opsin.server.images import ImageLoader
from opsin.server.request_asker import RequestAsker
from opsin.worker import DecoderPool, WorkerEngine, WorkerPool, may_have_gpus, open_workers

SLOTS = 16
PROCESSES = max(2, min(16, os.cpu_count() or 1))
"""Processes that load images."""
_MOST_WORKERS = 8  # that nobody asked for
_PARALLEL = f"{SLOTS}; 1 with --ctx"


@dataclass(frozen=True, slots=True)
class _Target:
    """Where the rows go."""

    output: Path | None
    options: BatchOptions

    def place(self, rows: Source) -> Path:
        """The file that the ledger lies beside: the output, or the folder of the images."""
        if rows.is_requests and self.options.sidecar is not None:
            raise BadParameter("Requests in OpenAI's form have no files to write beside: leave out --sidecar.")
        if self.output is None:
            if rows.folder is None:
                raise BadParameter("Answers beside images of a list or table need -o, too: it keeps what is done.")
            return rows.folder.resolve()
        path = expand(self.output)
        if not path.name.lower().endswith(ENDINGS):
            raise BadParameter(f"The kind of {path} is not known by its name: use {', '.join(ENDINGS)}.")
        return path

    @contextmanager
    def ledger(self, place: Path) -> Iterator[Ledger]:
        """The ledger beside the output. Raises BadParameter where the output is there without one."""
        path = place.with_name(f"{place.name}.opsin")
        if not os.access(path.parent, os.W_OK):
            raise BadParameter(
                f"The folder {path.parent} is not there or not writable: make it, or give another output."
            )
        overwrite = self.options.overwrite
        if self.output is not None and place.exists() and not path.exists() and not overwrite:
            raise BadParameter(f"{place} is there already and has no ledger ({path.name}): --overwrite replaces it.")
        try:
            opened = Ledger(path, str(place))
        except LedgerBroken:
            if not overwrite:
                raise
            for old in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
                old.unlink(missing_ok=True)
            opened = Ledger(path, str(place))
        with closing(opened):
            if overwrite:  # nobody else has the ledger open now
                opened.clear()
                if self.output is not None:
                    place.unlink(missing_ok=True)
            yield opened

    def job(self, place: Path, ledger: Ledger, spec: dict[str, Any]) -> str:
        """The name of this job in the ledger. Raises BadParameter for another job than before."""
        name, known = fingerprint(spec), ledger.jobs()
        if known and name not in known and not self.options.new:
            changed = "; ".join(differences(list(known.values())[-1], spec))
            raise BadParameter(
                f"The output belongs to another job: {changed}. Use another output, --new to add this job's rows to "
                "it, or --overwrite to start over."
            )
        fields = [output_fields(one) for one in (spec, *known.values())]
        if place.suffix.lower() in {".csv", ".parquet"} and any(one != fields[0] for one in fields):
            raise BadParameter("The schema has other fields, so its rows need other columns: give another output.")
        ledger.begin(name, spec)
        return name

    def open(self, place: Path, fields: dict[str, str], ledger: Ledger) -> Output:
        """The output, at the end of what was written before."""
        kind = place.suffix.lower()
        if self.output is None or kind == ".parquet":
            return StoredOutput(place if self.output else None, fields, ledger)
        return (CsvOutput if kind == ".csv" else Output)(place, fields, ledger)


def _beside(kind: Kind, item: Item, row: Row) -> None:
    if not isinstance(item.images[0], str) or "://" in item.images[0] or item.images[0].startswith("data:"):
        raise BadParameter("The image is no file, so nothing can be written beside it.")
    write_sidecar(sidecar_path(Path(item.images[0]), kind), kind, row)


@o.flags_of(SamplingParams, *o.LABELS, "system", *o.ANSWER, "boxes", "confidence")
@o.flags_of(
    EngineSettings, *o.ENGINE, "kv_unified", "image_max_tokens", "image_min_tokens", "disk_cache", parallel=_PARALLEL
)
@o.flags_of(ImageOptions, *o.IMAGES)
@o.flags_of(ImageSettings, *o.PAGES)
@o.flags_of(BatchOptions, *BatchOptions.model_fields)
def batch(
    source: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="a folder, a pattern, a JSONL, CSV, Parquet or tar file, or - for a list"),
    ],
    question: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="the question; {filename}, {caption}, {COLUMN} are filled in"),
    ] = None,
    *,
    output: Annotated[Path | None, o.output("-o", "--output", help="a .jsonl, .csv or .parquet file")] = None,
    ray: Annotated[str | None, o.job(metavar="[ADDRESS]", help="run on a Ray cluster; -o is a folder")] = None,
    cpus_per_worker: Annotated[
        int | None, o.job(min=1, help="with --ray: CPUs for each worker (default: one GPU)")
    ] = None,
    quiet: Annotated[bool, o.output("-q", "--quiet", help="print errors only")] = False,
    json_schema: Annotated[Path | None, o.answer(help="file with a JSON schema; its fields become columns")] = None,
    **flags: Any,
) -> None:
    """Ask one question about each image of a folder or each row of a table; resume where a run was stopped."""
    hush(quiet=quiet)
    options = checked(BatchOptions, o.given(BatchOptions, flags))
    if ray is not None:
        refuse(options)
    elif output is None and options.sidecar is None:
        raise BadParameter("The output is missing: give -o FILE.jsonl (or .csv, .parquet), or --sidecar txt.")
    elif options.skip_existing and options.sidecar is None:
        raise BadParameter("--skip-existing needs --sidecar: an output file keeps what is done by itself.")
    elif cpus_per_worker is not None:
        raise BadParameter("--cpus-per-worker is for a cluster: give --ray, too, or --workers and --threads instead.")
    params, system = checked(SamplingParams, o.answer_fields(flags, json_schema)), flags["system"]
    whole = ray is None and (options.sidecar == "json" if output is None else output.suffix.lower() == ".jsonl")
    for name in ("boxes", "confidence"):
        if getattr(params, name) and not whole:
            raise BadParameter(f"Tables and texts have no place for {name}: give -o FILE.jsonl with --{name}.")
    limits = checked(ImageSettings, {"fetch": True, **o.given(ImageSettings, flags)})
    rows = _chosen(open_source(source, image_column=options.image_column, id_column=options.id), options)
    if rows.note:
        tell(f"({rows.note})")
    template = _template(question, rows, params, system)
    if rows.is_requests and limits.pages:
        raise BadParameter("Each request of this input chooses pages in its file parts: leave out --pages.")
    settings = o.settings_of(flags, SLOTS)
    shown = checked(ImageOptions, {name: flags[name] for name in o.IMAGES})
    asked = Question(template, params, system, limits, options.image_seconds, options.fetch_private, shown)
    if ray is not None:
        raise typer.Exit(batch_on_ray(rows, asked, settings, options, output, address=ray, cpus=cpus_per_worker))
    with ExitStack() as stack:
        raise typer.Exit(_Batch(rows, asked, settings, _Target(output, options), stack).run())


def _template(question: str | None, rows: Source, asked: SamplingParams, system: str | None) -> PromptTemplate:
    if rows.is_requests:
        if question or system or asked.has_value:
            raise BadParameter(
                "Each request of this input has its own prompt: leave out PROMPT, --system, --json-schema, --choices."
            )
        return PromptTemplate("")
    if not (question or "").strip():
        raise BadParameter('The prompt is missing: opsin batch INPUT -o OUTPUT "Describe this image."')
    return PromptTemplate(question or "", rows.columns)


def _chosen(rows: Source, options: BatchOptions) -> Source:
    """The rows of an input that are asked: the first ones, or some at random."""

    def read() -> Iterator[Item]:
        items: Iterable[Item] = rows if options.sample is None else sample(rows, options.sample)
        return islice(items, options.limit)

    sizes = (rows.total, options.limit, options.sample)
    return replace(rows, read=read, total=min((size for size in sizes if size is not None), default=None))


class _Batch:
    """One run of the command. What it opens is closed with `stack`."""

    def __init__(self, rows: Source, asked: Question, settings: EngineSettings, to: _Target, stack: ExitStack) -> None:
        self._rows, self._asked, self._settings, self._to = rows, asked, settings, to
        self._workers, self._stack = to.options.workers, stack
        self._each = settings  # of each worker
        self._engine: WorkerEngine | WorkerPool | None = None

    def run(self) -> int:
        """Ask all rows; the exit code."""
        to, options, place = self._to, self._to.options, self._to.place(self._rows)
        given, asked = self._settings, self._asked
        pair = resolve(given.model, given.mmproj)
        spec = job_spec(pair, given, asked)
        ledger = self._stack.enter_context(to.ledger(place))
        job = to.job(place, ledger, spec)
        if options.retry_failed:
            ledger.retry_failed(job)
        on_cpu = given.gpu_layers == 0 or not may_have_gpus()
        if self._workers is None and on_cpu and not (given.threads or given.threads_batch or given.threads_encode):
            from opsin.compose import plan_workers

            # Threads wait for each other behind each operation of a graph, those of several workers do not.
            left = None if self._rows.total is None else max(0, self._rows.total - sum(ledger.counts(job)))
            groups = _MOST_WORKERS if left is None else left // SLOTS
            apart = not asked.params.labels and asked.images.tiles is None and all_differ(self._rows)
            self._workers, self._each = plan_workers(pair, given, min(_MOST_WORKERS, groups), apart=apart)
        output = to.open(place, output_fields(asked.params.model_dump()), ledger)
        self._stack.callback(output.close)
        line = ProgressLine(self._rows.total)
        items: Iterable[Item] = self._rows
        skipped = Counter[str]()
        if options.skip_existing and options.sidecar is not None:
            items = without_sidecars(items, partial(sidecar_path, kind=options.sidecar), skipped)
        run = Run(
            job,
            items,
            self._open_asker,
            ledger,
            output,
            ahead=PROCESSES,
            dead=lambda: self._engine.error if self._engine else None,
            total=self._rows.total,
            sidecar=None if options.sidecar is None else partial(_beside, options.sidecar),
            tell=line.show,
        )
        try:
            with line.bar:
                asyncio.run(run.run())
                output.finish(by_input=options.order != "done")
        except (KeyboardInterrupt, OpsinError):
            say(f"opsin: stopped: {summary(run.figures)}; the same command goes on from here")
            raise
        if skipped := skipped + self._rows.skipped:
            tell(f"(left out: {', '.join(f'{count:,} × {why}' for why, count in skipped.most_common(8))})")
        tell(f"({summary(run.figures)})")
        self._report(ledger, job, place)
        done, failed = ledger.counts(job)
        if failed:
            say(f"opsin: {failed:,} of {done + failed:,} rows failed; --retry-failed asks them again")
        return 1 if failed else 0

    async def _open_asker(self) -> Asker:
        """The model, when the first row is to be asked."""
        settings = self._each
        with working("loading the model"):
            engine = open_workers(settings.model, settings.mmproj, settings, workers=self._workers)
            self._stack.callback(engine.close)
            loaded = await asyncio.to_thread(engine.wait_ready)
            prompts = await asyncio.to_thread(PromptBuilder, loaded.source)
        self._engine = engine
        if self._asked.params.boxes:
            check_boxes(loaded.info)
        for notice in filter(None, (DEMO if loaded.is_demo else None, loaded.notice)):
            tell(notice)
        about = {"placement": loaded.placement.as_dict(), "model": loaded.info.as_dict()}
        asker: ImageAsker | RequestAsker
        if self._rows.is_requests:
            asker = self._request_asker(engine, about)
        else:
            asker = ImageAsker(engine, prompts, self._asked, processes=PROCESSES, about=about)
        self._stack.callback(asker.close)
        return asker

    def _request_asker(self, engine: WorkerEngine | WorkerPool, about: Row) -> RequestAsker:
        """What answers whole requests; their images are data: or http(s) addresses."""
        values = self._settings.model_dump(exclude_unset=True)
        values |= {"fetch_images": True, "max_pages": self._asked.limits.max_pages}
        settings = ServerSettings(**values)
        resolve = system_addresses if self._asked.private else None
        images = ImageLoader(settings, resolve=resolve, pool=DecoderPool(self._asked.seconds))
        defaults = self._asked.params.model_dump(exclude_unset=True, exclude={"json_schema"})
        defaults |= self._asked.images.fields()
        return RequestAsker(ModelManager(settings, engine, slots=engine.slots), images, about, defaults)

    def _report(self, ledger: Ledger, job: str, place: Path) -> None:
        path = self._to.options.report or place.with_name(f"{place.name}.report.html")
        for line in report_text(ledger, job).splitlines():
            tell(line)
        if path.name != "none":
            write_report(ledger, job, path, title=f"opsin batch: {place.name}")
            tell(f"(report: {path})")
