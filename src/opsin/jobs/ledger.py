"""What a job has done, in one SQLite file beside its output: the row that each id has there, and how it went.

The output is written first and the ledger after it, in groups. What the output holds beyond the ledger's last commit is
cut off when the job goes on, so each row is there exactly once wherever it was killed.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opsin.core.errors import BadParameter, OpsinError
from opsin.jobs.row import COUNTS, TIMES, numbers

State = Literal["new", "pending", "done", "failed", "seen"]
"""Of an id: never asked, begun or to be asked again, answered, an error row, or met before in this run."""

PENDING, DONE, FAILED = 0, 1, 2
_STATES: dict[int, State] = {PENDING: "pending", DONE: "done", FAILED: "failed"}
_NUMBERS = (*COUNTS, *TIMES)
_TABLES = f"""
CREATE TABLE IF NOT EXISTS jobs (job TEXT PRIMARY KEY, spec TEXT NOT NULL, begun REAL NOT NULL);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS samples (job TEXT, id TEXT, rank INTEGER, jpeg BLOB, PRIMARY KEY (job, id));
CREATE TABLE IF NOT EXISTS rows (
  job TEXT NOT NULL, id TEXT NOT NULL, seq INTEGER NOT NULL, run INTEGER NOT NULL, state INTEGER NOT NULL DEFAULT 0,
  attempt INTEGER NOT NULL DEFAULT 0, question BLOB, at INTEGER, length INTEGER, row BLOB, error_code TEXT,
  ended REAL, text TEXT, {", ".join(f"{name} REAL" for name in _NUMBERS)}, PRIMARY KEY (job, id)
);
CREATE INDEX IF NOT EXISTS by_question ON rows (job, question) WHERE state = 1;
CREATE INDEX IF NOT EXISTS by_place ON rows (at) WHERE at IS NOT NULL;
"""
_ORDER = {True: "(SELECT begun FROM jobs WHERE jobs.job = rows.job), seq, ended", False: "at, ended"}
_SAMPLE_TEXT = 200  # characters of an answer that the report shows
_UPDATE = f"""
UPDATE rows SET state = ?, attempt = ?, question = ?, at = ?, length = ?, row = ?, error_code = ?, ended = ?, text = ?,
  {", ".join(f"{name} = ?" for name in _NUMBERS)} WHERE job = ? AND id = ?
"""  # noqa: S608 - the names are our own
HOLES = "holes"
"""The note that the output holds rows which the ledger does not have there any more."""
BUSY = "Another `opsin batch` writes to {}: wait for it, or give another output."


class LedgerBroken(OpsinError):
    """The ledger cannot be read or written."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A row that was asked.

    `question` says what was asked about which pixels. The row is `length` bytes at `at` of the output, or `stored` in
    the ledger where the output is written at the end.
    """

    id: str
    state: int
    attempt: int
    row: Mapping[str, Any]
    question: bytes | None = None
    at: int | None = None
    length: int | None = None
    stored: bytes | None = None


class Ledger:
    """The open ledger of one output; used in one thread. Raises BadParameter when another process has it open."""

    def __init__(self, path: Path, output: str) -> None:
        self._path, self._run = path, 0
        try:
            self._db = sqlite3.connect(path, timeout=0.5, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA locking_mode = EXCLUSIVE; BEGIN IMMEDIATE;")
            for statement in filter(str.strip, _TABLES.split(";")):
                self._db.execute(statement)
            self._run = int(self.note("run") or 0) + 1
            self.take_note("run", str(self._run))
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise BadParameter(BUSY.format(output)) from None
            raise self._broken(error) from None

    def close(self) -> None:
        """Close it; what was not committed is lost."""
        with suppress(sqlite3.Error):
            self._db.close()

    def note(self, name: str) -> str | None:
        """A value that was noted under that name."""
        found = self._one("SELECT value FROM notes WHERE name = ?", name)
        return None if found is None else str(found[0])

    def take_note(self, name: str, value: str) -> None:
        """Remember a value under a name."""
        self._do("INSERT INTO notes VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", name, value)

    def jobs(self) -> dict[str, dict[str, Any]]:
        """What each job asks, by its name."""
        return {job: json.loads(spec) for job, spec in self.query("SELECT job, spec FROM jobs ORDER BY begun")}

    def begin(self, job: str, spec: Mapping[str, Any]) -> None:
        """Note that this job writes to the output from now on."""
        self._do("INSERT OR IGNORE INTO jobs VALUES (?, ?, ?)", job, json.dumps(spec), time.time())

    def claim(self, job: str, items: Sequence[tuple[str, int]]) -> list[tuple[State, int]]:
        """Note ids with their place in the input; for each, how it stands and how often it was asked."""
        marks = ", ".join("?" * len(items))
        query = f"SELECT id, state, attempt, run FROM rows WHERE job = ? AND id IN ({marks})"  # noqa: S608 - question marks
        known = {name: rest for name, *rest in self.query(query, job, *(name for name, _ in items))}
        found: list[tuple[State, int]] = []
        new, old = list[tuple[Any, ...]](), list[tuple[Any, ...]]()
        for name, seq in items:
            if name not in known:
                new.append((job, name, seq, self._run))
                found.append(("new", 0))
            elif known[name][2] == self._run:
                found.append(("seen", 0))
            else:
                old.append((seq, self._run, job, name))
                found.append((_STATES[known[name][0]], known[name][1]))
            known[name] = [PENDING, 0, self._run]
        self._do("BEGIN")
        self._do("INSERT INTO rows (job, id, seq, run) VALUES (?, ?, ?, ?)", *new, many=True)
        self._do("UPDATE rows SET seq = ?, run = ? WHERE job = ? AND id = ?", *old, many=True)
        self._do("COMMIT")
        return found

    def end(self, job: str, rows: Iterable[Ended], size: int, samples: Mapping[str, tuple[int, bytes]]) -> None:
        """Commit a group of rows; `size` is the output's in bytes after them."""
        self._do("BEGIN")
        for one in rows:
            error = (one.row["error"] or {}).get("code")
            self._do(
                _UPDATE,
                *(one.state, one.attempt, one.question, one.at, one.length, one.stored, error, time.time()),
                *((one.row["text"] or "")[:_SAMPLE_TEXT], *numbers(one.row).values(), job, one.id),
            )
        for name, (rank, jpeg) in samples.items():
            self._do("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?)", job, name, rank, jpeg)
        self.take_note("size", str(size))
        self._do("COMMIT")

    def answered(self, job: str, question: bytes) -> tuple[int | None, int | None, bytes | None] | None:
        """Where the answer to a question is: its place and length in the output, or the row itself."""
        query = "SELECT at, length, row FROM rows WHERE job = ? AND question = ? AND state = 1 LIMIT 1"
        return self._one(query, job, question)

    def forget_after(self, size: int) -> None:
        """Rows that lie behind so many bytes of the output are to be asked again."""
        self._do("UPDATE rows SET state = 0, at = NULL WHERE at + length > ?", size)

    def retry_failed(self, job: str) -> int:
        """Error rows are to be asked again, and the output is to be written anew without them; how many."""
        self._do("BEGIN")
        query = "UPDATE rows SET state = 0, at = NULL, row = NULL WHERE job = ? AND state = 2"
        count = self._do(query, job).rowcount
        if count:
            self.take_note(HOLES, "1")
        self._do("COMMIT")
        return count

    def clear(self) -> None:
        """Forget all jobs and rows."""
        self._do("BEGIN")
        for table in ("rows", "jobs", "samples"):
            self._do(f"DELETE FROM {table}")  # noqa: S608 - our own names
        self._do("DELETE FROM notes WHERE name <> 'run'")  # rows of this run are told from the next one's
        self._do("COMMIT")

    def counts(self, job: str) -> tuple[int, int]:
        """Answered and failed rows of a job."""
        found = dict(self.query("SELECT state, count(*) FROM rows WHERE job = ? GROUP BY state", job))
        return found.get(DONE, 0), found.get(FAILED, 0)

    def places(self, *, by_input: bool) -> Iterator[tuple[int, int]]:
        """Place and length of all rows in the output; in the order of the input, or of the file."""
        yield from self._db.execute(f"SELECT at, length FROM rows WHERE at IS NOT NULL ORDER BY {_ORDER[by_input]}")  # noqa: S608

    def in_order(self) -> bool:
        """Whether the output holds the rows of each job in the order of the input."""
        behind = "SELECT 1 FROM (SELECT at, lag(at) OVER (PARTITION BY job ORDER BY seq) AS before FROM rows WHERE at "
        return self._one(f"{behind} IS NOT NULL) WHERE before > at LIMIT 1") is None

    def move(self, head: int, flag: str, *, by_input: bool) -> int:
        """Note that a new file with rows in this order behind `head` bytes replaces the output; its size."""
        placed = f"SELECT job, id, ? + sum(length) OVER (ORDER BY {_ORDER[by_input]} ROWS UNBOUNDED PRECEDING) - length"
        self._do("BEGIN")
        self._do(
            f"UPDATE rows SET at = placed.at FROM ({placed} AS at FROM rows WHERE at IS NOT NULL) AS placed "  # noqa: S608
            "WHERE rows.job = placed.job AND rows.id = placed.id",
            head,
        )
        (size,) = self.query("SELECT coalesce(max(at + length), ?) FROM rows", head)[0]
        self.take_note("size", str(size))
        self.take_note(flag, "1")
        self.take_note(HOLES, "0")
        self._do("COMMIT")
        return int(size)

    def stored(self, *, by_input: bool) -> Iterator[bytes]:
        """The rows of an output that is written at the end."""
        for (row,) in self._db.execute(f"SELECT row FROM rows WHERE row IS NOT NULL ORDER BY {_ORDER[by_input]}"):  # noqa: S608
            yield row

    def _do(self, sql: str, *values: Any, many: bool = False) -> sqlite3.Cursor:
        try:
            return self._db.executemany(sql, values) if many else self._db.execute(sql, values)
        except sqlite3.Error as error:
            raise self._broken(error) from None

    def _one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        found: tuple[Any, ...] | None = self._do(sql, *values).fetchone()
        return found

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of an answer of the database."""
        return self._do(sql, *values).fetchall()

    def _broken(self, error: sqlite3.Error) -> LedgerBroken:
        return LedgerBroken(
            f"The ledger {self._path} cannot be used ({error}): free some space if the disk is full and run the same "
            "command again; if the file is damaged, start over with --overwrite."
        )


def fingerprint(spec: Mapping[str, Any]) -> str:
    """A short name for what a job asks: 12 hex digits."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two jobs ask differently, each as "name: before, now"."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}" for name in names]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
