"""A hundred thousand rows without a model: flat memory, little time a row, a quick resume; and hostile images."""

from __future__ import annotations

import asyncio
import csv
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.jobs.asker import Asked, ImageAsker, Question
from opsin.jobs.item import Item
from opsin.jobs.ledger import Ledger
from opsin.jobs.output import CsvOutput, Output, StoredOutput
from opsin.jobs.row import Row
from opsin.jobs.runner import Figures, Run
from opsin.jobs.sources import open_source
from opsin.jobs.template import PromptTemplate
from opsin.prompt import PromptBuilder
from opsin.worker import WorkerEngine, client

pytestmark = pytest.mark.jobs

ROWS = 100_000
WORKER = Path(__file__).parents[1] / "worker"


class Quick:
    """Answers at once."""

    slots = 8

    async def prepare(self, item: Item) -> Asked:
        return Asked(item, item.id.encode(), [], "")

    async def ask(self, asked: Asked) -> Row:
        await asyncio.sleep(0)
        usage = {"prompt_tokens": 600, "completion_tokens": 30, "image_tokens": 576, "cached_tokens": 0}
        about = {"usage": usage, "finish_reason": "stop", "guard": None, "images": [], "timings": {}}
        return {"error": None, "text": f"An answer about {asked.item.id}. " * 5, "stages": {"total_ms": 3.0}, **about}

    def drop(self, asked: Asked) -> None:
        pass


def run(folder: Path, kind: Any, ending: str, tell: Callable[[Figures], None] = lambda _: None) -> Figures:
    path = folder / f"out{ending}"
    ledger = Ledger(folder / f"{path.name}.opsin", str(path))
    output = kind(path, {}, ledger)
    try:
        ledger.begin("job", {})
        source = open_source(str(folder / "in.csv"), image_column="image", id_column=None)

        async def go() -> Figures:
            async def opened() -> Quick:
                return Quick()

            return await Run("job", source, opened, ledger, output, ahead=4, dead=lambda: None, tell=tell).run()

        figures = asyncio.run(go())
        output.finish(by_input=True)
        return figures
    finally:
        output.close()
        ledger.close()


@pytest.mark.parametrize(("kind", "ending"), [(Output, ".jsonl"), (CsvOutput, ".csv"), (StoredOutput, ".parquet")])
def test_many_rows_take_little_memory_and_time_and_resume_at_once(tmp_path: Path, kind: Any, ending: str) -> None:
    with (tmp_path / "in.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "n"))
        rows.writerows((f"images/{number:06}.jpg", number) for number in range(ROWS))
    process, seen = psutil.Process(), dict[int, int]()

    def tell(figures: Figures) -> None:
        seen.setdefault(figures.done // 10_000, process.memory_info().rss)

    gc.collect()
    begin = time.perf_counter()
    figures = run(tmp_path, kind, ending, tell)
    seconds = time.perf_counter() - begin
    assert figures.done == ROWS
    assert max(seen.values()) - seen[2] < 64 * 2**20, seen
    print(f"{ending}: {1e3 * seconds / ROWS:.3f} ms a row, {max(seen.values()) / 2**20:.0f} MiB")
    assert seconds / ROWS < 0.003
    begin = time.perf_counter()
    again = run(tmp_path, kind, ending)
    seconds = time.perf_counter() - begin
    print(f"{ending}: resumed in {seconds:.2f} s")
    assert (again.done, again.before) == (0, ROWS)
    if ending != ".parquet":  # which is written anew
        assert seconds < 5


@pytest.mark.parametrize("width", [13, 17])  # see fake_worker: crashes, and hangs, in the encoder
def test_an_image_that_aborts_or_hangs_the_worker_is_one_error_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(client, "LEAST_CALL_SECONDS", 2.0)
    monkeypatch.setattr(client, "CALL_FACTOR", 1.0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(WORKER), os.environ.get("PYTHONPATH", "")]))
    for number in range(12):
        Image.new("RGB", (width if number == 5 else 30 + number, 20), (number, 0, 0)).save(
            tmp_path / f"{number:02}.png"
        )
    command = [sys.executable, "-c", "import fake_worker; fake_worker.main()"]
    engine = WorkerEngine(None, None, EngineSettings(parallel=4), command=command)
    path = tmp_path / "out.jsonl"
    ledger = Ledger(tmp_path / "out.jsonl.opsin", str(path))
    output = Output(path, {}, ledger)
    try:
        loaded = engine.wait_ready()
        question = Question(PromptTemplate("What?"), SamplingParams(max_tokens=5, guard=False))

        async def go() -> None:
            async def opened() -> ImageAsker:
                return asker

            asker = ImageAsker(engine, PromptBuilder(loaded.source), question, processes=2, about={})
            source = open_source(str(tmp_path), image_column=None, id_column=None)
            try:
                await Run("job", source, opened, ledger, output, ahead=2, dead=lambda: engine.error).run()
            finally:
                asker.close()

        ledger.begin("job", {})
        asyncio.run(go())
        output.finish(by_input=True)
    finally:
        output.close()
        ledger.close()
        engine.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{number:02}.png" for number in range(12)]
    assert [row["id"] for row in rows if row["error"]] == ["05.png"]
    assert engine.restarts >= 2
