"""A job on a Ray cluster: Ray Data reads the rows, keeps a model on each GPU busy, and writes a folder of Parquet.

Which rows are done is Ray's own checkpoint: a file with the ids of each part of the output, in `OUTPUT.opsin`. It is
there as `….pending.parquet` before its part is, and gets its name afterwards; what is pending when a job begins is
deleted together with its part. So each row is in the output exactly once, whatever dies.
"""

import asyncio
import contextlib
import importlib
import itertools
import json
import logging
import os
import pickle
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from opsin.core.errors import BadParameter, ModelError, OpsinError, copy_of
from opsin.core.settings import EngineSettings
from opsin.jobs.asker import Asked, Asker, ImageAsker, Question
from opsin.jobs.item import Item
from opsin.jobs.ledger import BUSY, Ledger, differences, fingerprint
from opsin.jobs.output import StoredOutput, import_arrow, table, table_schema
from opsin.jobs.row import flat
from opsin.jobs.runner import DuplicateId, Run
from opsin.jobs.spec import job_spec
from opsin.models import resolve
from opsin.prompt import PromptBuilder
from opsin.worker import WorkerEngine

BLOCK_ROWS, PART_ROWS = 32, 256
"""Rows that a worker gets at a time, and the least in one part of the output, except for the last ones."""
_BLOCKS = 2  # that a worker asks at the same time, so that its slots are full while one of them ends
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray listens on 127.0.0.1 alone
_CONNECT_SECONDS = 10.0
_READ_BYTES = 8 * 2**20
_FILTER_BYTES = 2**28  # memory of a process that leaves out what is done
_TRIES = 3  # passes over what is left, where the cluster itself failed
_OWN_CPUS = 2  # that Ray's own steps take: cutting the rows into blocks, and leaving out what is done


class RayFailed(OpsinError):
    """The Ray cluster cannot be reached, or cannot finish the job."""


@dataclass(frozen=True, slots=True)
class RayJob:
    """What the workers need to know. `fields` are those of the schema, `folder` is where relative paths begin."""

    spec: Mapping[str, Any]
    asked: Question
    settings: EngineSettings
    fields: Mapping[str, str]
    folder: str
    processes: int


def connect(address: str) -> Any:
    """Join a cluster; an empty address is that of RAY_ADDRESS, or else a new cluster that ends with this process.

    Raises BadParameter without Ray, and RayFailed where no cluster answers.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise BadParameter("--ray needs Ray: pip install 'opsin[ray]'.") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong comes as an error, too
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "ignore_reinit_error": True}
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # Ray's ports let in whoever reaches them: on one machine nobody else needs to. It reads this when imported.
        os.environ[_LOOPBACK] = "0"
        constants: Any = importlib.import_module("ray._private.ray_constants")
        constants.ENABLE_RAY_CLUSTER = False
        options |= {"num_cpus": (os.cpu_count() or 1) + _OWN_CPUS, "include_dashboard": False}
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit() and "://" not in address:  # Ray itself waits for minutes
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise RayFailed(f"No Ray cluster can be used at {address} ({why}): start one with ray start --head.") from None
    return ray


def worker_resources(ray: Any, workers: int | None, cpus: int | None) -> tuple[int, dict[str, Any]]:
    """How many workers there are, and what each of them takes: a GPU, or so many CPUs. Raises BadParameter."""
    there = ray.cluster_resources()
    if cpus is None:
        workers = workers or int(there.get("GPU", 0))
        if not workers:
            raise BadParameter("The cluster has no GPU: give each worker CPUs with --cpus-per-worker N.")
        return workers, {"num_gpus": 1, "num_cpus": 0}
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    fit = min(sum(int(node // cpus) for node in nodes), int((sum(nodes) - _OWN_CPUS) // cpus))
    if fit < 1:
        raise BadParameter(
            f"The cluster has too few CPUs for {cpus} a worker and {_OWN_CPUS} for Ray's own steps: give fewer with "
            "--cpus-per-worker, or add nodes."
        )
    return workers or fit, {"num_cpus": cpus}


class RayOutput:
    """The folder of Parquet parts, what Ray notes beside it, and a lock; `place` is a path or an address of Arrow's.

    Raises BadParameter for the output of another job or run, and OSError.
    """

    def __init__(self, place: str, spec: Mapping[str, Any], *, overwrite: bool = False) -> None:
        import_arrow()
        self._arrow: Any = importlib.import_module("pyarrow.fs")
        self.place, self.ids = place, f"{place}.opsin/ids"
        self._files, self._path = self._arrow.FileSystem.from_uri(place)
        if overwrite:
            for folder in (self._path, f"{self._path}.opsin"):
                if self._there(folder):
                    self._files.delete_dir(folder)
        self._files.create_dir(f"{self._path}.opsin/ids")
        with contextlib.ExitStack() as held:
            if "://" not in place:
                try:
                    held.enter_context(FileLock(f"{place}.opsin/lock", timeout=0))
                except Timeout:
                    raise BadParameter(BUSY.format(place)) from None
            self._claim(spec)
            self._held = held.pop_all()

    def close(self) -> None:
        """Let others write to the output."""
        self._held.close()

    def counts(self) -> tuple[int, int]:
        """Answered and failed rows of the output."""
        failed, total = 0, 0
        for name in self._parts():
            codes = self._read(name, "error_code").column(0)
            total, failed = total + len(codes), failed + len(codes) - codes.null_count
        return total - failed, failed

    def attempts(self) -> dict[str, int]:
        """How often rows were asked that are to be asked again."""
        return self._load("attempts") or {}

    def retry_failed(self) -> None:
        """Take the error rows out of the output and of the checkpoint, so that they are asked again.

        A part that has some is written anew without them. Both are pending in between: whoever dies then, the next run
        deletes both and asks all of their rows again.
        """
        parts: dict[str, list[str]] = {}
        for name in self._parts():
            parts.setdefault(name.rpartition("-")[0], []).append(name)
        attempts = self.attempts()
        for part, names in parts.items():
            failed = [row for name in names for row in self._read(name, "id", "error_code", "attempt").to_pylist()]
            again = {row["id"]: row["attempt"] for row in failed if row["error_code"] is not None}
            if again and self._there(f"{self._path}.opsin/ids/{part}.parquet"):
                attempts |= again
                self._save("attempts", attempts)
                self._without(part, names)

    def _without(self, part: str, names: list[str]) -> None:
        arrow, parquet = import_arrow()
        done, new, move = f"{self._path}.opsin/ids", uuid.uuid4().hex, self._files.move
        rows = arrow.concat_tables([self._read(name) for name in names])
        kept = rows.filter(rows["error_code"].is_null())
        if kept.num_rows:
            parquet.write_table(kept.select(["id"]), f"{done}/{new}.pending.parquet", filesystem=self._files)
            parquet.write_table(kept, f"{self._path}/{new}-0.parquet", filesystem=self._files)
        move(f"{done}/{part}.parquet", f"{done}/{part}.pending.parquet")
        if kept.num_rows:
            move(f"{done}/{new}.pending.parquet", f"{done}/{new}.parquet")
        for name in names:
            self._files.delete_file(f"{self._path}/{name}")
        self._files.delete_file(f"{done}/{part}.pending.parquet")

    def _claim(self, spec: Mapping[str, Any]) -> None:
        before = self._load("job")
        if before is None and self._parts():
            raise BadParameter(f"{self.place} has rows of something else: give another folder, or --overwrite.")
        if before is not None and before != spec:
            changed = "; ".join(differences(before, spec))
            raise BadParameter(
                f"The output belongs to another job: {changed}. Use another folder, or --overwrite to start over."
            )
        self._save("job", spec)

    def _there(self, path: str) -> bool:
        return bool(self._files.get_file_info(path).type != self._arrow.FileType.NotFound)

    def _parts(self) -> list[str]:
        every = self._files.get_file_info(self._arrow.FileSelector(self._path, allow_not_found=True))
        return [one.base_name for one in every if one.base_name.endswith(".parquet")]

    def _read(self, name: str, *columns: str) -> Any:
        _, parquet = import_arrow()
        return parquet.ParquetFile(f"{self._path}/{name}", filesystem=self._files).read(columns or None)

    def _load(self, name: str) -> Any:
        path = f"{self._path}.opsin/{name}.json"
        if not self._there(path):
            return None
        with self._files.open_input_file(path) as file:
            return json.loads(file.read())

    def _save(self, name: str, value: Any) -> None:
        path = f"{self._path}.opsin/{name}.json"
        with self._files.open_output_stream(f"{path}.new") as file:
            file.write(json.dumps(value).encode())
        self._files.move(f"{path}.new", path)


def run_on_ray(
    ray: Any,
    job: RayJob,
    items: Iterable[Item],
    output: RayOutput,
    *,
    workers: int,
    resources: Mapping[str, Any],
    progress: bool = False,
) -> None:
    """Ask the rows that are not in the output yet. `items` are read by a task of the cluster, `workers` ask.

    Raises what keeps the model from being used, what is wrong with the input, and RayFailed.
    """
    data: Any = importlib.import_module("ray.data")
    context = data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, too
    context.enable_progress_bars, context.raise_original_map_exception = progress, True
    context.target_max_block_size = _READ_BYTES
    checkpoint: Any = importlib.import_module("ray.data.checkpoint")
    noted = checkpoint.CheckpointConfig("id", output.ids, delete_checkpoint_on_success=False)
    noted.checkpoint_actor_memory_bytes = _FILTER_BYTES
    context.checkpoint_config = noted
    attempts = output.attempts()
    pool = data.ActorPoolStrategy(
        min_size=1, max_size=workers, initial_size=workers, max_concurrent_calls_per_actor=_BLOCKS
    )
    for left in range(_TRIES, 0, -1):
        rows = data.read_datasource(_source(data, job, items), override_num_blocks=1, num_cpus=0)
        answers = rows.repartition(target_num_rows_per_block=BLOCK_ROWS).map_batches(
            _Worker,
            batch_size=None,
            batch_format="pyarrow",
            compute=pool,
            fn_constructor_args=(job, attempts),
            **resources,
        )
        try:
            answers.write_parquet(output.place, min_rows_per_file=PART_ROWS, ray_remote_args={"num_cpus": 0})
        except Exception as error:
            if (own := _own_error(error)) is not None:
                raise copy_of(own) from None
            if not isinstance(error, ray.exceptions.RayError):
                raise
            if left == 1:
                cause = getattr(error, "cause", None) or error
                why = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
                raise RayFailed(
                    f"The cluster could not finish ({why}): what was answered is there; look at ray status, and run "
                    "the same command again."
                ) from None
        else:
            return


def _own_error(error: BaseException | None) -> OpsinError | None:
    """The error of ours that Ray's is about."""
    while error is not None and not isinstance(error, OpsinError):
        error = getattr(error, "cause", None) or error.__cause__
    return error


def _source(data: Any, job: RayJob, items: Iterable[Item]) -> Any:
    """What Ray reads the rows with, in one task: a table with `id`, and the item itself."""

    class Rows(data.Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            block: Any = importlib.import_module("ray.data.block")
            about = block.BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [data.ReadTask(lambda: _blocks(job, items), about)]

    return Rows()


def _blocks(job: RayJob, items: Iterable[Item]) -> Iterator[Any]:
    arrow, _ = import_arrow()
    with contextlib.suppress(OSError):
        os.chdir(job.folder)
    rows, seen = _unique(items), False
    schema = arrow.schema([("id", arrow.string()), ("item", arrow.large_binary())])
    while chunk := list(itertools.islice(rows, BLOCK_ROWS)):
        seen = True
        yield arrow.table([[one.id for one in chunk], [pickle.dumps(one) for one in chunk]], schema)
    if not seen:
        yield schema.empty_table()


def _unique(items: Iterable[Item]) -> Iterator[Item]:
    seen: set[int] = set()  # hashes of ids
    for place, item in enumerate(items, 1):
        if (key := hash(item.id)) in seen:
            error = DuplicateId(f"The id {item.id!r} is that of an earlier row: give each row its own (--id).")
            yield Item(f"{item.id} (row {place})", item.source, error=error)
        else:
            seen.add(key)
            yield item


class _BlockRun(Run):
    """Asks the rows of one block. All blocks of a worker have its slots in common, which `shared` keeps."""

    shared: dict[str, Any]

    async def _open(self) -> None:
        await super()._open()
        self._slots = self.shared.setdefault("slots", self._slots)

    def _sample(self, asked: Asked) -> None:
        """There is no report."""


class _Worker:
    """What Ray starts once a GPU: a model in a process of its own, which is loaded for the first block."""

    def __init__(self, job: RayJob, attempts: Mapping[str, int]) -> None:
        self._job, self._attempts = job, attempts
        self._schema = table_schema(job.fields)
        self._shared: dict[str, Any] = {}
        self._engine: WorkerEngine | None = None
        self._asker: asyncio.Future[Asker] | None = None

    async def __call__(self, block: Any) -> Any:
        """A table of items becomes one of answers, in the same order, so that Ray can do it again."""
        job, ledger = self._job, Ledger(Path(":memory:"), "")
        items = [pickle.loads(one) for one in block["item"].to_pylist()]  # noqa: S301 - from our own job
        run = _BlockRun(
            *(fingerprint(job.spec), items, self._open, ledger, StoredOutput(None, job.fields, ledger)),
            ahead=job.processes,
            dead=lambda: self._engine.error if self._engine else None,
        )
        run.shared = self._shared
        try:
            await run.run()
        except OpsinError:
            if self._shared:  # the model worked until now: Ray starts this process again, here or elsewhere
                os._exit(1)
            raise
        rows = [json.loads(row) for row in ledger.stored(by_input=True)]
        ledger.close()
        for row in rows:
            row["attempt"] += self._attempts.get(row["id"], 0)
        return table([flat(row, job.fields) for row in rows], self._schema) if rows else self._schema.empty_table()

    async def _open(self) -> Asker:
        if self._asker is None:
            self._asker = asyncio.ensure_future(asyncio.to_thread(self._load))
        return await asyncio.shield(self._asker)

    def _load(self) -> Asker:
        job, settings, asked = self._job, self._job.settings, self._job.asked
        with contextlib.suppress(OSError):
            os.chdir(job.folder)
        here = job_spec(resolve(settings.model, settings.mmproj), settings, asked)
        if here != job.spec:
            changed = "; ".join(differences(job.spec, here))
            raise ModelError(f"{os.uname().nodename} has another model: {changed}. Give all nodes the same files.")
        self._engine = engine = WorkerEngine(settings.model, settings.mmproj, settings)
        loaded = engine.wait_ready()
        about = {"placement": loaded.placement.as_dict(), "model": loaded.info.as_dict()}
        return ImageAsker(engine, PromptBuilder(loaded.source), asked, processes=job.processes, about=about)
