"""`opsin batch --ray`: the same job on a cluster, into a folder of Parquet parts."""

import os
import re
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from opsin.cli.console import is_quiet, say, tell
from opsin.core.errors import BadParameter
from opsin.core.files import expand
from opsin.core.settings import EngineSettings
from opsin.jobs.asker import Question
from opsin.jobs.item import Item, Source
from opsin.jobs.options import BatchOptions
from opsin.jobs.output import ENDINGS, OutputFailed
from opsin.jobs.ray_data import RayJob, RayOutput, connect, run_on_ray, worker_resources
from opsin.jobs.row import output_fields
from opsin.jobs.spec import job_spec
from opsin.models import resolve

_ADDRESS = re.compile(r"([A-Za-z][\w+.-]+):/(?=[^/])")  # what a Path makes of s3://


def refuse(options: BatchOptions) -> None:
    """Raise BadParameter for a flag that is given and has no meaning on a cluster."""
    for name in ("sidecar", "skip_existing", "order", "report", "new"):
        if getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            raise BadParameter(f"{flag} does not go with --ray, which writes a folder of Parquet parts: leave it out.")


def batch_on_ray(
    rows: Source,
    asked: Question,
    settings: EngineSettings,
    options: BatchOptions,
    output: Path | None,
    *,
    address: str,
    cpus: int | None,
) -> int:
    """Ask all rows on the cluster; the exit code."""
    if rows.is_requests:
        raise BadParameter("Requests in OpenAI's form are not asked on a cluster: leave out --ray.")
    items: Iterable[Item] = list(rows) if rows.once else rows  # standard input, which only this process can read
    place = _place(output)
    if cpus is not None and settings.threads is None:
        settings = settings.model_copy(update={"threads": cpus})
    spec = job_spec(resolve(settings.model, settings.mmproj), settings, asked)
    processes = max(2, min(16, cpus or os.cpu_count() or 1))
    job = RayJob(spec, asked, settings, output_fields(asked.params.model_dump()), str(Path.cwd()), processes)
    try:
        with closing(RayOutput(place, spec, overwrite=options.overwrite)) as to:
            ray = connect(address)
            count, resources = worker_resources(ray, options.workers, cpus)
            if options.retry_failed:
                to.retry_failed()
            progress = sys.stderr.isatty() and not is_quiet()
            run_on_ray(ray, job, items, to, workers=count, resources=resources, progress=progress)
            done, failed = to.counts()
    except KeyboardInterrupt:
        say("opsin: stopped; the same command goes on from here")
        raise
    except OSError as error:
        raise OutputFailed(f"{place} cannot be read or written ({error}): check it, and try again.") from None
    tell(f"({done:,} rows answered, {failed:,} failed)")
    if failed:
        say(f"opsin: {failed:,} of {done + failed:,} rows failed; --retry-failed asks them again")
    return 1 if failed else 0


def _place(output: Path | None) -> str:
    """The folder of parts, absolute, or its address. Raises BadParameter for what is none."""
    if output is None:
        raise BadParameter("The output is missing: with --ray, give -o FOLDER for the Parquet parts.")
    if output.name.lower().endswith(ENDINGS[:3]) or expand(output).is_file():
        raise BadParameter(
            f"With --ray the output is a folder of Parquet parts, and {output} is a file: give -o FOLDER."
        )
    text = str(output)
    return _ADDRESS.sub(r"\1://", text, count=1) if _ADDRESS.match(text) else str(expand(output).absolute())
