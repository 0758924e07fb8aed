"""Jobs without a model: each row once wherever a run ends, one bad row is one error row, equal questions are one."""

from __future__ import annotations

import asyncio
import csv
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsin.core.errors import BadImage, BadInput, BadParameter, EngineDied, OpsinError
from opsin.jobs.asker import Asked
from opsin.jobs.item import Item
from opsin.jobs.ledger import Ledger, differences, fingerprint
from opsin.jobs.output import CsvOutput, Output, OutputFailed, StoredOutput
from opsin.jobs.row import Row, columns, schema_fields
from opsin.jobs.runner import Figures, Run, sample
from opsin.jobs.template import PromptTemplate

SCHEMA = json.dumps({"type": "object", "properties": {"kind": {"type": "string"}, "count": {"type": "integer"}}})
FIELDS = schema_fields(SCHEMA)
KINDS: dict[str, Any] = {".jsonl": Output, ".csv": CsvOutput, ".parquet": StoredOutput}


class Killed(BaseException):
    """The process ends here."""


def row_of(text: str, **more: Any) -> Row:
    usage = {"prompt_tokens": 600, "completion_tokens": 5, "image_tokens": 576, "cached_tokens": 0}
    stages = {"encode_ms": 3.0, "image_prefill_ms": 1.0, "text_prefill_ms": 0.5, "decode_ms": 2.0, "total_ms": 7.0}
    about = {"finish_reason": "stop", "usage": usage, "guard": None, "images": [{"sha256": "ab" * 32}]}
    return {"error": None, "text": text, "reasoning": None, **about, "stages": stages, "timings": {}, **more}


class FakeAsker:
    """Answers with what was asked; the engine dies under ids that begin with "dies", and images can be bad."""

    slots = 2

    def __init__(self, *, seed: int = 0, kill_after: int = 10**9, spare: Iterable[str] = ()) -> None:
        self.asked: list[str] = []
        self.running: set[str] = set()
        self.deaths: Counter[str] = Counter()
        self.error: OpsinError | None = None
        self.kill_after = kill_after
        self._random, self._spare = random.Random(seed), set(spare)
        self.dead = asyncio.Event()

    async def prepare(self, item: Item) -> Asked:
        await asyncio.sleep(0)
        if item.id.startswith("bad") and item.id not in self._spare:
            raise BadImage("The image is damaged; save it again.")
        question = item.columns.get("same", item.id)
        return Asked(item, str(question).encode(), [], str(question))

    async def ask(self, asked: Asked) -> Row:
        name = asked.item.id
        self.running.add(name)
        try:
            for _ in range(self._random.randrange(4)):
                await asyncio.sleep(0)
                self._check(name)
            if len(self.asked) >= self.kill_after:
                raise Killed
            self.asked.append(name)
            if name.startswith("dies"):
                self.deaths.update(self.running)
                self.dead.set()
                self.dead = asyncio.Event()
                raise EngineDied("The engine died.")
            return row_of(f"answer to {asked.text}", output={"kind": f"={asked.text}", "count": len(asked.text)})
        finally:
            self.running.discard(name)

    def _check(self, name: str) -> None:
        if self.dead.is_set():
            raise EngineDied("The engine died.")

    def drop(self, asked: Asked) -> None:
        pass


def items(names: Iterable[str]) -> list[Item]:
    return [Item(name, f"{name}.png", (f"{name}.png",)) for name in names]


def go(folder: Path, ending: str, rows: Iterable[Item], asker: FakeAsker, **options: Any) -> Figures:
    path = folder / f"out{ending}"
    retry, order = options.pop("retry", False), options.pop("order", "input")
    ledger = Ledger(folder / f"{path.name}.opsin", str(path))
    try:
        if retry:
            ledger.retry_failed("job")
        output = KINDS[ending](path, FIELDS, ledger)
        try:
            ledger.begin("job", {"prompt": "x"})

            async def run() -> Figures:
                async def opened() -> FakeAsker:
                    return asker

                run = Run("job", rows, opened, ledger, output, ahead=2, dead=lambda: asker.error, **options)
                return await run.run()

            figures = asyncio.run(run())
            output.finish(by_input=order == "input")
            return figures
        finally:
            output.close()
    finally:
        ledger.close()


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


@pytest.mark.parametrize("ending", KINDS)
def test_rows_come_in_the_order_of_the_input_and_a_bad_one_is_an_error_row(tmp_path: Path, ending: str) -> None:
    names = [f"{number:02}" for number in range(30)]
    names[7] = "bad"
    figures = go(tmp_path, ending, items(names), FakeAsker(seed=3))
    rows = read(tmp_path / f"out{ending}")
    assert [row["id"] for row in rows] == names
    assert figures.done == 30
    assert figures.errors == {"bad_image": 1}
    flat = ending != ".jsonl"
    assert (rows[7]["error_code"] if flat else rows[7]["error"]["code"]) == "bad_image"
    assert rows[8]["text"] == "answer to 08"
    assert str(rows[8]["count"] if flat else rows[8]["output"]["count"]) == "2"
    if flat:
        assert tuple(rows[0]) == columns(FIELDS)


def test_a_cell_that_a_spreadsheet_would_execute_is_text(tmp_path: Path) -> None:
    go(tmp_path, ".csv", items(["=cmd|' /C calc'!A0", "@x", "-2+3", "plain"]), FakeAsker())
    for row in read(tmp_path / "out.csv"):
        assert all(not cell.startswith(("=", "@", "+", "-")) for cell in row.values())
        assert row["kind"].startswith("'=")


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.integers(0, 25), max_size=5), ending=st.sampled_from(list(KINDS)), seed=st.integers(0, 99))
def test_every_row_is_there_once_wherever_runs_are_killed(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], ending: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("kill")
    names = [f"row{number}" for number in range(40)]
    asked: list[str] = []
    for kill in kills:
        asker = FakeAsker(seed=seed, kill_after=kill)
        try:
            go(folder, ending, items(names), asker)
        except Killed:
            path = folder / f"out{ending}"
            if ending != ".parquet":  # what an unfinished write leaves
                with path.open("ab") as file:
                    file.write(b'{"id": "half a r')
        asked += asker.asked
    go(folder, ending, items(names), FakeAsker(seed=seed))
    rows = read(folder / f"out{ending}")
    assert [row["id"] for row in rows] == names
    assert all(row["text"] == f"answer to {row['id']}" for row in rows)


def test_an_output_that_lost_its_end_is_filled_up(tmp_path: Path) -> None:
    names = [str(number) for number in range(20)]
    go(tmp_path, ".jsonl", items(names), FakeAsker())
    path = tmp_path / "out.jsonl"
    path.write_bytes(path.read_bytes()[:-1000])
    go(tmp_path, ".jsonl", items(names), asker := FakeAsker())
    assert 0 < len(asker.asked) < 20
    assert [row["id"] for row in read(path)] == names
    path.unlink()
    go(tmp_path, ".jsonl", items(names), asker := FakeAsker())
    assert len(asker.asked) == 20
    assert [row["id"] for row in read(path)] == names


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_an_output_that_another_program_has_changed_is_not_touched(tmp_path: Path, ending: str) -> None:
    names = [str(number) for number in range(20)]
    go(tmp_path, ending, items(names), FakeAsker())
    path = tmp_path / f"out{ending}"
    path.write_text(changed := path.read_text().replace("answer", "a longer answer"))
    with pytest.raises(OutputFailed):
        go(tmp_path, ending, items([*names, "20"]), FakeAsker())
    assert path.read_text() == changed


@pytest.mark.parametrize("ending", KINDS)
def test_failed_rows_are_asked_again_only_when_that_is_wanted_and_the_input_may_grow(
    tmp_path: Path, ending: str
) -> None:
    names = ["a", "bad1", "c", "bad2"]
    go(tmp_path, ending, items(names), FakeAsker())
    again = go(tmp_path, ending, items(names), asker := FakeAsker(spare=["bad1"]))
    assert asker.asked == []
    assert again.before == 4
    go(tmp_path, ending, items(["a", "a2", *names[1:]]), FakeAsker(spare=["bad1"]), retry=True)
    rows = read(tmp_path / f"out{ending}")
    assert [row["id"] for row in rows] == ["a", "a2", "bad1", "c", "bad2"]
    assert [int(row["attempt"]) for row in rows] == [1, 1, 2, 1, 2]
    codes = [row["error_code"] or None if ending != ".jsonl" else row["error"] and row["error"]["code"] for row in rows]
    assert codes == [None, None, None, None, "bad_image"]


def test_a_retry_that_is_killed_at_once_leaves_each_row_once(tmp_path: Path) -> None:
    names = ["a", "bad1", "c"]
    go(tmp_path, ".jsonl", items(names), FakeAsker())
    ledger = Ledger(tmp_path / "out.jsonl.opsin", "out.jsonl")
    assert ledger.retry_failed("job") == 1
    ledger.close()  # and nothing else happened
    go(tmp_path, ".jsonl", items(names), FakeAsker(spare=["bad1"]))
    rows = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == names
    assert all(row["error"] is None for row in rows)


def test_braces_of_json_in_a_prompt_stay() -> None:
    item = Item("x", "a/b.png", columns={"name": "cat"})
    text = 'Answer as {"a": {"b": 1}} about {name}, not {{name}}: {"c": {name}}'
    filled = PromptTemplate(text, ("name",)).fill(item, {})
    assert filled == 'Answer as {"a": {"b": 1}} about cat, not {name}: {"c": cat}'
    assert PromptTemplate('{"a": {"b": 1}}').fill(item, {}) == '{"a": {"b": 1}}'


def test_the_same_question_about_equal_pixels_is_asked_once(tmp_path: Path) -> None:
    rows = [Item(str(n), f"{n}.png", columns={"same": n % 5}) for n in range(60)]
    figures = go(tmp_path, ".jsonl", rows[:40], asker := FakeAsker())
    assert sorted(asker.asked) == sorted(set(asker.asked))
    assert len(asker.asked) == 5
    assert figures.same == 35
    go(tmp_path, ".jsonl", rows, asker := FakeAsker())
    assert asker.asked == []
    found = read(tmp_path / "out.jsonl")
    assert [row["text"] for row in found] == [f"answer to {n % 5}" for n in range(60)]
    assert sum("same_as" not in row for row in found) == 5
    assert all(row["stages"]["total_ms"] == 0 for row in found if "same_as" in row)


def test_an_id_that_comes_twice_is_an_error_row(tmp_path: Path) -> None:
    for _ in range(2):
        go(tmp_path, ".jsonl", items(["a", "b", "a"]), FakeAsker())
        rows = read(tmp_path / "out.jsonl")
        assert [row["id"] for row in rows] == ["a", "b", "a (row 3)"]
        assert rows[2]["error"]["code"] == "duplicate_id"


def test_a_row_that_kills_the_engine_is_one_error_row(tmp_path: Path) -> None:
    names = [f"row{number}" for number in range(12)]
    names[4] = "dies"
    figures = go(tmp_path, ".jsonl", items(names), FakeAsker(seed=5))
    rows = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows if row["error"]] == ["dies"]
    assert rows[4]["error"]["code"] == "engine_died"
    assert figures.errors == {"engine_died": 1}


def test_an_engine_that_cannot_be_used_ends_the_run_and_what_was_answered_stays(tmp_path: Path) -> None:
    asker = FakeAsker()
    honest = asker.ask

    async def ask(asked: Asked) -> Row:
        if len(asker.asked) == 5:
            asker.error = EngineDied("It cannot be started.")
            raise EngineDied("It cannot be started.")
        return await honest(asked)

    asker.ask = ask  # type: ignore[method-assign]
    names = [str(number) for number in range(20)]
    with pytest.raises(EngineDied):
        go(tmp_path, ".jsonl", items(names), asker)
    assert len(read(tmp_path / "out.jsonl")) == 5
    go(tmp_path, ".jsonl", items(names), FakeAsker())
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == names


def test_a_second_run_on_one_output_is_refused(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "a.opsin", "a.jsonl")
    with pytest.raises(BadParameter):
        Ledger(tmp_path / "a.opsin", "a.jsonl")
    first.close()
    Ledger(tmp_path / "a.opsin", "a.jsonl").close()


def test_a_disk_that_is_full_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    honest, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        honest(descriptor)

    monkeypatch.setattr("opsin.jobs.runner._GROUP_ROWS", 8)
    monkeypatch.setattr(os, "fsync", full)
    names = [str(number) for number in range(40)]
    with pytest.raises(OutputFailed):
        go(tmp_path, ".jsonl", items(names), FakeAsker())
    assert len(read(tmp_path / "out.jsonl")) == 8
    go(tmp_path, ".jsonl", items(names), FakeAsker())
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == names


def test_a_sample_is_the_same_in_each_run_and_in_the_order_of_the_input() -> None:
    rows = items(map(str, range(1000)))
    chosen = [item.id for item in sample(rows, 50)]
    assert chosen == [item.id for item in sample(list(rows), 50)]
    assert chosen == sorted(chosen, key=int)
    assert len(set(chosen)) == 50


def test_a_changed_job_says_what_changed() -> None:
    before = {"prompt": "a", "temperature": 0.2, "model": "m"}
    now = {**before, "temperature": 0.0}
    assert fingerprint(before) != fingerprint(now)
    assert differences(before, now) == ["temperature was 0.2 and is 0.0"]


def test_a_field_named_as_a_column_gets_another_name() -> None:
    assert "output_text" in columns({"text": "string"})
    assert schema_fields("[1]") == schema_fields("no JSON") == {}


def test_a_ledger_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.opsin").write_text("no database " * 100)
    with pytest.raises(OpsinError) as raised:
        Ledger(tmp_path / "a.opsin", "a")
    assert not isinstance(raised.value, sqlite3.Error)


def test_what_writes_beside_the_image_may_refuse(tmp_path: Path) -> None:
    def beside(item: Item, row: Row) -> None:
        if item.id == "b":
            raise BadInput("no")

    go(tmp_path, ".jsonl", items("abc"), FakeAsker(), sidecar=beside)
    assert [bool(row["error"]) for row in read(tmp_path / "out.jsonl")] == [False, True, False]
