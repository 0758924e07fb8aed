"""What of a job on Ray needs no cluster: a worker with two blocks, and error rows that leave the output."""

import asyncio
import itertools
import json
import os
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pf
import pyarrow.parquet as pq
import pytest
from PIL import Image

from opsin.core.errors import BadParameter, ModelError
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.jobs import ray_data
from opsin.jobs.asker import Question
from opsin.jobs.item import Item
from opsin.jobs.output import table, table_schema
from opsin.jobs.ray_data import RayJob, RayOutput, _Worker
from opsin.jobs.row import columns
from opsin.jobs.spec import job_spec
from opsin.jobs.template import PromptTemplate
from opsin.models import resolve
from opsin.worker import WorkerEngine

FAKE = Path(__file__).parents[2] / "worker"


def job(folder: Path, **more: Any) -> RayJob:
    settings = EngineSettings(parallel=4)
    asked = Question(PromptTemplate("What?"), SamplingParams(max_tokens=5, guard=False))
    spec = job_spec(resolve(None, None), settings, asked)
    return RayJob({**spec, **more}, asked, settings, {}, str(folder), 2)


def block(items: list[Item]) -> Any:
    return pa.table({"id": [item.id for item in items], "item": [pickle.dumps(item) for item in items]})


@pytest.fixture
def images(tmp_path: Path) -> list[Item]:
    """The sixth crashes the fake worker in the encoder; see fake_worker."""
    items = []
    for number in range(24):
        name = f"{number:02}.png"
        Image.new("RGB", (13 if number == 5 else 30 + number, 20), (number, 0, 0)).save(tmp_path / name)
        items.append(Item(name, name, (name,)))
    return items


@pytest.mark.slow
def test_an_image_that_kills_the_model_is_one_error_row_also_while_another_block_is_asked(
    images: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", "import fake_worker; fake_worker.main()"]
    monkeypatch.setattr(ray_data, "WorkerEngine", partial(WorkerEngine, command=command))
    monkeypatch.chdir(tmp_path)
    worker = _Worker(job(tmp_path), {"03.png": 2})

    async def go() -> list[Any]:
        try:
            return await asyncio.gather(worker(block(images[:12])), worker(block(images[12:])))
        finally:
            if worker._engine is not None:
                await asyncio.to_thread(worker._engine.close)
                (await worker._open()).close()

    rows = [row for part in asyncio.run(go()) for row in part.to_pylist()]
    assert [row["id"] for row in rows] == [item.id for item in images]
    assert [row["id"] for row in rows if row["error_code"]] == ["05.png"]
    assert {row["id"]: row["attempt"] for row in rows if row["attempt"] != 1} == {"03.png": 3}


def test_a_node_with_other_files_of_the_model_says_so(images: list[Item], tmp_path: Path) -> None:
    worker = _Worker(job(tmp_path, model="another.gguf"), {})
    with pytest.raises(ModelError, match=r"another\.gguf"):
        asyncio.run(worker(block(images[:2])))


def test_ids_that_come_twice_are_error_rows() -> None:
    items = list(ray_data._unique([Item("a", "1"), Item("b", "2"), Item("a", "3")]))
    assert [item.id for item in items] == ["a", "b", "a (row 3)"]
    assert items[2].error is not None


SPEC = {"prompt": "What?"}


def row(name: str, error: str | None = None, attempt: int = 1) -> list[Any]:
    cells: dict[str, Any] = dict.fromkeys(columns({}))
    return list({**cells, "id": name, "error_code": error, "attempt": attempt}.values())


def fill(place: Path) -> None:
    """Three parts as Ray writes them: without error rows, with some, and of error rows alone."""
    RayOutput(str(place), SPEC).close()
    place.mkdir()
    parts = {"x_0": [row("a"), row("b")], "x_1": [row("c"), row("d", "bad_image"), row("e")], "x_2": [row("f", "died")]}
    for name, rows in parts.items():
        pq.write_table(table(rows, table_schema({})), place / f"{name}-0.parquet")
        ids = pa.table({"id": [one[0] for one in rows]})
        pq.write_table(ids, place.with_name(f"{place.name}.opsin") / "ids" / f"{name}.parquet")


def recover(place: Path) -> None:
    """What Ray does when a job begins: what is pending goes, with its part."""
    for pending in place.with_name(f"{place.name}.opsin").glob("ids/*.pending.parquet"):
        for part in place.glob(f"{pending.name.removesuffix('.pending.parquet')}*"):
            part.unlink()
        pending.unlink()


def state(place: Path) -> tuple[list[str], list[str]]:
    """Ids of the rows in the output, and those that are done."""
    rows = [one["id"] for part in place.glob("*.parquet") for one in pq.ParquetFile(part).read().to_pylist()]
    noted = place.with_name(f"{place.name}.opsin").glob("ids/*.parquet")
    return sorted(rows), sorted(one["id"] for part in noted for one in pq.ParquetFile(part).read().to_pylist())


def test_error_rows_leave_output_and_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "out"
    fill(place)
    output = RayOutput(str(place), SPEC)
    assert output.counts() == (4, 2)
    output.retry_failed()
    assert state(place) == (["a", "b", "c", "e"],) * 2
    assert output.attempts() == {"d": 1, "f": 1}
    assert output.counts() == (4, 0)
    output.close()


class Killed(BaseException):
    """The process is gone."""


class Fragile:
    """A file system whose user dies before its nth change."""

    def __init__(self, real: Any, changes: int) -> None:
        self._real, self._left = real, changes

    def __getattr__(self, name: str) -> Any:
        if name not in {"move", "delete_file", "open_output_stream"}:
            return getattr(self._real, name)

        def change(*values: Any, **more: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise Killed
            return getattr(self._real, name)(*values, **more)

        return change


def test_wherever_a_retry_is_killed_each_row_is_in_the_output_or_to_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = pq.write_table, pq.ParquetFile
    for changes in itertools.count():
        place = tmp_path / str(changes)
        fill(place)
        output = RayOutput(str(place), SPEC)
        output._files = fragile = Fragile(pf.LocalFileSystem(), changes)

        def written(rows: Any, path: str, *, filesystem: Any, fragile: Any = fragile) -> None:
            fragile.open_output_stream(f"{path}.counted").close()
            Path(f"{path}.counted").unlink()
            write(rows, path)

        with monkeypatch.context() as patched:
            patched.setattr(pq, "write_table", written)
            patched.setattr(pq, "ParquetFile", lambda path, **_: read(path))
            try:
                output.retry_failed()
                ended = True
            except Killed:
                ended = False
        output.close()
        recover(place)
        rows, done = state(place)
        assert rows == done
        assert len(set(rows)) == len(rows)
        assert {"a", "b"} <= set(rows)
        if ended:
            break
    assert changes > 10


def test_another_job_and_another_run_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "out"
    fill(place)
    with pytest.raises(BadParameter, match="Which"):
        RayOutput(str(place), {"prompt": "Which?"})
    first = RayOutput(str(place), SPEC)
    with pytest.raises(BadParameter):
        RayOutput(str(place), SPEC)
    first.close()
    RayOutput(str(place), {"prompt": "Which?"}, overwrite=True).close()
    assert json.loads((tmp_path / "out.opsin" / "job.json").read_text()) == {"prompt": "Which?"}
    assert not place.exists()
    (tmp_path / "theirs").mkdir()
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "theirs" / "part.parquet")
    with pytest.raises(BadParameter):
        RayOutput(str(tmp_path / "theirs"), SPEC)
