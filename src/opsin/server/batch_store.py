"""Files and batches of the Batch API as rows of SQLite or PostgreSQL. Every call blocks: none is for the event loop.

A file is a row and chunks of at most `CHUNK` bytes. Work is taken with a lease: whoever stops renewing it loses it to
the next server that asks, and what the loser still writes changes nothing. Times are Unix seconds.
"""

import contextlib
import functools
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from opsin.core.errors import BadParameter, QueueFull
from opsin.server.errors import BadField, NotFound, StoreFailed

_LOG = logging.getLogger("opsin.server")
LEASE_SECONDS = 30.0
"""How long work belongs to a server that does not renew its lease."""
MAX_FILES = 10_000
"""Files of a key."""
MAX_OPEN = 100
"""Batches of a key that have not ended."""
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
_PRAGMAS = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA journal_size_limit=67108864"
CHUNK = 2**20
"""Bytes of a piece of a file."""
TABLES = sa.MetaData()
_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _columns(kind: Any, names: str, **options: Any) -> list[sa.Column[Any]]:
    """Columns of one kind, which always have a value unless `nullable` says otherwise."""
    return [sa.Column(name, kind, **{"nullable": False, **options}) for name in names.split()]


FILES = sa.Table(
    "opsin_files",
    TABLES,
    *_columns(_NUMBER, "number", primary_key=True),
    *_columns(sa.Text, "id", unique=True),
    *_columns(sa.Text, "owner", index=True),
    *_columns(sa.Text, "filename purpose"),
    *_columns(sa.BigInteger, "bytes created_at expires_at"),
)
CHUNKS = sa.Table(
    "opsin_chunks",
    TABLES,
    *_columns(_NUMBER, "file n", primary_key=True, autoincrement=False),
    *_columns(sa.LargeBinary, "data"),
)
_MOMENTS = "in_progress_at finalizing_at completed_at failed_at expired_at cancelling_at cancelled_at"
BATCHES = sa.Table(
    "opsin_batches",
    TABLES,
    *_columns(_NUMBER, "number", primary_key=True),
    *_columns(sa.Text, "id", unique=True),
    *_columns(sa.Text, "owner status", index=True),
    *_columns(sa.Text, "model endpoint input_file_id completion_window"),
    *_columns(sa.Text, "output_file_id error_file_id holder", nullable=True),
    *_columns(sa.JSON(none_as_null=True), "metadata errors", nullable=True),
    *_columns(sa.BigInteger, "created_at expires_at output_seconds"),
    *_columns(sa.BigInteger, _MOMENTS, nullable=True),
    *_columns(sa.Integer, "total completed failed", default=0),
    *_columns(sa.Float, "lease", default=0.0),
)
ROWS = sa.Table(
    "opsin_rows",
    TABLES,
    *_columns(_NUMBER, "batch n", primary_key=True, autoincrement=False),
    *_columns(sa.Text, "custom_id"),
    *_columns(sa.BigInteger, "start size"),
    *_columns(sa.Integer, "attempt", default=0),
    *_columns(sa.Float, "lease", default=0.0),
    *_columns(sa.Text, "holder", nullable=True),
    *_columns(sa.Boolean, "good", nullable=True),  # as long as there is no result, null
    *_columns(sa.LargeBinary, "result", nullable=True),
    sa.Index("opsin_rows_by_result", "batch", "good", "n"),
)
_KINDS = {"file": FILES, "batch": BATCHES}
_F, _B, _R = FILES.c, BATCHES.c, ROWS.c
_RESULTS = {"yield_per": 32}  # so many are in memory together
Kind = Literal["file", "batch"]


class Row(NamedTuple):
    """A request of a batch, held by this server. `attempt` is how often it failed for reasons that are not its own."""

    batch: int
    n: int
    custom_id: str
    attempt: int
    owner: str
    endpoint: str
    line: bytes


class BatchStore:
    """The tables, made if there are none. Methods raise StoreFailed when the database does not do its part.

    `place` is a path for SQLite, a file for its owner alone, or the address of a database. Raises BadParameter for an
    address that cannot be used.
    """

    def __init__(self, place: Path | str) -> None:
        url = _read_url(place)
        said = f"The batch store {url.render_as_string(hide_password=True)}"
        self.holder = secrets.token_hex(8)
        self._owners_turn = ""
        try:
            self._engine = _connect(url)
            with self._engine.begin() as c:
                if url.drivername != "sqlite":
                    c.execute(sa.text("SELECT pg_advisory_xact_lock(7206319)"))  # two servers may start together
                TABLES.create_all(c)
                if not _fits(c):
                    raise BadParameter(f"{said} is of another version of Opsin: give another (--batch-store).")
                if url.drivername == "sqlite":  # whoever held something is gone; else some work is done twice
                    _free(c)
        except ImportError:
            raise BadParameter("PostgreSQL needs psycopg: pip install 'opsin[postgres]'.") from None
        except (SQLAlchemyError, OSError) as error:
            raise BadParameter(f"{said} cannot be opened ({_reason(error)}): give another (--batch-store).") from None

    def close(self) -> None:
        """Let the database go, and what this server holds, too."""
        with contextlib.suppress(StoreFailed), self._begin() as c:  # else others have it when the leases end
            _free(c, self.holder)
        self._engine.dispose()

    @contextlib.contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        """A transaction; SQLite's are immediate, and one at a time."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, OSError, MemoryError) as error:
            _LOG.error("the batch store failed: %s", _reason(error))
            raise StoreFailed("The store of files and batches cannot be used now: the server's log says why.") from None

    # Files and batches of one owner.

    def find(self, kind: Kind, owner: str, name: str) -> sa.RowMapping:
        """The owner's file or batch. Raises NotFound."""
        with self._begin() as c:
            return _found(c, kind, owner, name)

    def page(
        self, kind: Kind, owner: str, after: str | None, limit: int, *, oldest_first: bool = False, purpose: str = ""
    ) -> tuple[Sequence[sa.RowMapping], bool]:
        """At most `limit` of the owner's, newest first unless told otherwise, and whether there are more.

        Raises NotFound if `after` names none.
        """
        table = _KINDS[kind]
        number, query = table.c.number, sa.select(table).where(table.c.owner == owner)
        if purpose:
            query = query.where(_F.purpose == purpose)
        with self._begin() as c:
            if after is not None:
                last = _found(c, kind, owner, after, "after")["number"]
                query = query.where(number > last if oldest_first else number < last)
            query = query.order_by(number if oldest_first else number.desc()).limit(limit + 1)
            rows = c.execute(query).mappings().all()
        return rows[:limit], len(rows) > limit

    def put(self, owner: str, filename: str, file: IO[bytes], *, seconds: int, most_stored: int) -> sa.RowMapping:
        """Keep an uploaded file for that long. Raises BadField when the owner has too much."""
        mine = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(_F.bytes), 0)).where(_F.owner == owner)
        with self._begin() as c:
            count, stored = c.execute(mine).one()
            if count >= MAX_FILES or stored + file.seek(0, os.SEEK_END) > most_stored:
                raise BadField(
                    f"This key has {count:,} files of {stored:,} bytes; {MAX_FILES:,} of {most_stored:,} bytes "
                    "together are the limit: delete some.",
                    "file",
                )
            return self._write(c, file, seconds, owner=owner, filename=filename, purpose="batch")

    def _write(self, c: sa.Connection, file: IO[bytes], seconds: int, **values: str) -> sa.RowMapping:
        now = int(time.time())
        times = {"created_at": now, "expires_at": now + seconds}
        row = {"id": f"file-{secrets.token_hex(16)}", "bytes": file.seek(0, os.SEEK_END), **times, **values}
        kept = c.execute(sa.insert(FILES).values(row).returning(FILES)).mappings().one()
        file.seek(0)
        for n, data in enumerate(iter(functools.partial(file.read, CHUNK), b"")):
            c.execute(sa.insert(CHUNKS).values(file=kept["number"], n=n, data=data))
        return kept

    def chunk(self, number: int, n: int) -> bytes:
        """A chunk of a file; empty behind its end."""
        with self._begin() as c:
            return c.scalar(sa.select(CHUNKS.c.data).where(CHUNKS.c.file == number, CHUNKS.c.n == n)) or b""

    def delete_file(self, owner: str, name: str) -> None:
        """Raises NotFound, and BadField while a batch reads it."""
        with self._begin() as c:
            number = _found(c, "file", owner, name)["number"]
            reading = sa.select(_B.id).where(_B.input_file_id == name, _B.status.in_(OPEN))
            if (batch := c.scalar(reading.limit(1))) is not None:
                raise BadField(f"The file is the input of {batch}: wait for its end, or cancel it first.", "file_id")
            _drop(c, _F.number == number)

    def create(self, owner: str, seconds: int, **values: Any) -> sa.RowMapping:
        """A new batch that ends after `seconds`. Raises NotFound for its input, and QueueFull."""
        now = int(time.time())
        values |= {"id": f"batch_{secrets.token_hex(16)}", "owner": owner, "status": "validating", "created_at": now}
        with self._begin() as c:
            _found(c, "file", owner, values["input_file_id"], "input_file_id")
            open_ones = sa.select(sa.func.count()).where(_B.owner == owner, _B.status.in_(OPEN))
            if (c.scalar(open_ones) or 0) >= MAX_OPEN:
                raise QueueFull(f"This key has {MAX_OPEN} batches that have not ended, the limit: wait for one.")
            made = sa.insert(BATCHES).values(**values, expires_at=now + seconds).returning(BATCHES)
            return c.execute(made).mappings().one()

    def cancel(self, owner: str, name: str) -> sa.RowMapping:
        """Begin no more of its requests. Raises NotFound, and BadField for a batch that has ended."""
        which = (_B.id == name, _B.owner == owner, _B.status.in_(("validating", "in_progress", "cancelling")))
        since = sa.func.coalesce(_B.cancelling_at, int(time.time()))
        values = {"status": "cancelling", "cancelling_at": since, "holder": None, "lease": 0.0}
        with self._begin() as c:
            cancelled = sa.update(BATCHES).where(*which).values(values).returning(BATCHES)
            if (batch := c.execute(cancelled).mappings().first()) is None:
                status = _found(c, "batch", owner, name)["status"]
                said = f"The batch is {status}: only one that is validated or runs can be cancelled."
                raise BadField(said, "batch_id")
            return batch

    # Batches that begin or end: one server at a time works on one.

    def take_batch(self) -> sa.RowMapping | None:
        """A batch that is to be checked or ended, with a lease; None when there is none.

        One that this server holds already comes last: its work has failed.
        """
        now = time.time()
        running = sa.exists().where(_R.batch == _B.number, _R.good.is_(None), _R.lease > now)
        began = _B.status == "in_progress"
        over = sa.and_(began, sa.or_(_B.completed + _B.failed >= _B.total, _B.expires_at <= now))
        ends = sa.and_(sa.or_(over, _B.status == "cancelling"), ~running)
        due = sa.or_(_B.status.in_(("validating", "finalizing")), ends)
        free = sa.or_(_B.lease <= now, _B.holder == self.holder)
        first = sa.select(_B.number).where(due, free).order_by(_B.lease, _B.number).limit(1)
        values = {
            "holder": self.holder,
            "lease": now + LEASE_SECONDS,
            "status": sa.case((began, "finalizing"), else_=_B.status),
            "finalizing_at": sa.case((began, int(now)), else_=_B.finalizing_at),
        }
        number = first.with_for_update(skip_locked=True).scalar_subquery()
        with self._begin() as c:
            taken = sa.update(BATCHES).where(_B.number == number).values(values).returning(BATCHES)
            return c.execute(taken).mappings().first()

    def lines(self, batch: sa.RowMapping, most: int) -> Iterator[tuple[int, bytes]]:
        """The lines of its input, each with its place in the file; nothing comes after one of more than `most` bytes.

        Raises NotFound.
        """
        number = self.find("file", batch["owner"], batch["input_file_id"])["number"]
        held, start, n = b"", 0, 0
        while len(held) <= most and (data := self.chunk(number, n)):
            *whole, held = (held + data).split(b"\n")
            n += 1
            for line in whole:
                yield start, line
                start += len(line) + 1
        if held:
            yield start, held

    def begin(self, batch: sa.RowMapping, rows: Iterable[tuple[str, int, int]], errors: Sequence[Any] = ()) -> None:
        """Let a batch that this server holds run, with `rows` of custom_id, place and size; with `errors` it fails.

        Raises StoreFailed if it was cancelled or lost meanwhile.
        """
        new = [
            {"batch": batch["number"], "n": n, "custom_id": name, "start": start, "size": size}
            for n, (name, start, size) in enumerate(rows)
        ]
        with self._begin() as c:
            if errors:
                self._move(c, batch, "failed", errors=errors)
            else:
                c.execute(sa.insert(ROWS), new)
                self._move(c, batch, "in_progress", total=len(new))

    def _move(self, c: sa.Connection, batch: sa.RowMapping, status: str, **values: Any) -> None:
        mine = (_B.number == batch["number"], _B.holder == self.holder, _B.status == batch["status"])
        values |= {"status": status, f"{status}_at": int(time.time()), "holder": None, "lease": 0.0}
        if not c.execute(sa.update(BATCHES).where(*mine).values(values)).rowcount:
            raise StoreFailed(f"{batch['id']} was cancelled, or another server has it now.")

    def end(self, batch: sa.RowMapping, missing: Callable[[str], bytes]) -> None:
        """Give a batch its last status and its files, which have the results in the order of their rows.

        `missing` gives the line of a row that an expired batch did not answer, by its custom_id. Raises StoreFailed
        as `begin` does.
        """
        counts, status = {"failed": batch["failed"]}, "cancelled" if batch["status"] == "cancelling" else "completed"
        if status == "completed" and batch["completed"] + batch["failed"] < batch["total"]:
            counts, status = {"failed": batch["total"] - batch["completed"]}, "expired"
        mine, files = _R.batch == batch["number"], {}
        results = sa.select(_R.custom_id, _R.good, _R.result).where(mine).order_by(_R.n)
        with self._begin() as c, TemporaryFile() as output, TemporaryFile() as error:
            for row in c.execute(results, execution_options=_RESULTS):
                if row.result is not None:
                    (output if row.good else error).write(row.result)
                elif status == "expired":
                    error.write(missing(row.custom_id))
            for kind, file in (("output", output), ("error", error)):
                if file.tell():
                    names = {"filename": f"{batch['id']}_{kind}.jsonl", "purpose": "batch_output"}
                    made = self._write(c, file, batch["output_seconds"], owner=batch["owner"], **names)
                    files[f"{kind}_file_id"] = made["id"]
            c.execute(sa.delete(ROWS).where(mine))
            self._move(c, batch, status, **counts, **files)

    # Rows: each with one server at a time.

    def claim(self, model: str, room: int) -> list[Row]:
        """At most `room` rows for the server of that model. Owners take turns, each with its oldest batch first."""
        rows: list[Row] = []
        with self._begin() as c:
            while len(rows) < room and (row := self._claim_one(c, model)) is not None:
                self._owners_turn = row.owner
                rows.append(row)
        return rows

    def _claim_one(self, c: sa.Connection, model: str) -> Row | None:
        now = time.time()
        waiting = (_R.good.is_(None), _R.lease <= now)
        going = (_B.status == "in_progress", _B.model == model, _B.expires_at > now)
        some = sa.select(BATCHES).where(*going, sa.exists().where(_R.batch == _B.number, *waiting))
        next_one = some.order_by(_B.owner <= self._owners_turn, _B.owner, _B.number).limit(1)
        if (batch := c.execute(next_one).first()) is None:
            return None
        mine = _R.batch == batch.number
        n = sa.select(_R.n).where(mine, *waiting).order_by(_R.n).limit(1).with_for_update(skip_locked=True)
        values = {"holder": self.holder, "lease": now + LEASE_SECONDS}
        taken = sa.update(ROWS).where(mine, _R.n == n.scalar_subquery()).values(values).returning(ROWS)
        if (row := c.execute(taken).first()) is None:
            return None  # another server takes it at this moment
        chunk, (first, skip) = CHUNKS.c, divmod(row.start, CHUNK)
        part = sa.func.substr(chunk.data, sa.case((chunk.n == first, skip + 1), else_=1), row.size)
        among = chunk.n.between(first, (row.start + row.size - 1) // CHUNK)
        file = sa.and_(_F.id == batch.input_file_id, _F.number == chunk.file)
        parts = c.scalars(sa.select(sa.type_coerce(part, sa.LargeBinary)).where(file, among).order_by(chunk.n))
        line = b"".join(parts)[: row.size]
        return Row(row.batch, row.n, row.custom_id, row.attempt, batch.owner, batch.endpoint, line)

    def _change(self, c: sa.Connection, row: Row, **values: Any) -> bool:
        """Change a row; False if this server has lost it."""
        mine = (_R.batch == row.batch, _R.n == row.n, _R.holder == self.holder, _R.good.is_(None))
        return bool(c.execute(sa.update(ROWS).where(*mine).values(values)).rowcount)

    def finish(self, row: Row, result: bytes, *, good: bool) -> bool:
        """Keep a row's result, unless this server has lost the row; whether its batch has all now."""
        count = _B.completed if good else _B.failed
        counted = sa.update(BATCHES).where(_B.number == row.batch).values({count: count + 1})
        with self._begin() as c:
            changed = self._change(c, row, good=good, result=result)
            return changed and bool(c.scalar(counted.returning(_B.completed + _B.failed >= _B.total)))

    def give_back(self, row: Row, seconds: float, *, counted: bool) -> None:
        """Let another try a row, after that many seconds; `counted` is one attempt more."""
        with self._begin() as c:
            self._change(c, row, holder=None, lease=time.time() + seconds, attempt=row.attempt + counted)

    def renew(self, rows: Iterable[Row]) -> None:
        """Keep `rows` and the batch that this server works on."""
        lease = time.time() + LEASE_SECONDS
        with self._begin() as c:
            for row in rows:
                self._change(c, row, lease=lease)
            c.execute(sa.update(BATCHES).where(_B.holder == self.holder).values(lease=lease))

    def clean_up(self, keep_seconds: int) -> None:
        """Delete files whose time is over, and batches that ended that long ago."""
        now = time.time()
        read = sa.select(_B.input_file_id).where(_B.status.in_(OPEN))
        with self._begin() as c:
            _drop(c, sa.and_(_F.expires_at <= now, _F.id.not_in(read)))
            c.execute(sa.delete(BATCHES).where(_B.status.not_in(OPEN), _B.created_at <= now - keep_seconds))


def _read_url(place: Path | str) -> URL:
    """The address of the database; a path is one of SQLite. Raises BadParameter."""
    with contextlib.suppress(ArgumentError):
        url = URL.create("sqlite", database=str(place)) if isinstance(place, Path) else make_url(place)
        if url.drivername in {"postgres", "postgresql"}:
            url = url.set(drivername="postgresql+psycopg")
        if url.drivername in {"sqlite", "postgresql+psycopg"} and url.database:
            return url
    raise BadParameter(
        "--batch-store is no address of a database: give postgresql+psycopg://HOST/DATABASE or sqlite:///FILE."
    )


def _connect(url: URL) -> sa.Engine:
    """The database; SQLite's is a file for its owner alone, made if it is not there. Raises OSError, ImportError."""
    if url.drivername != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    file = Path(url.database or "")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.touch(0o600)
    # One transaction at a time, which holds the file from its beginning on.
    engine = sa.create_engine(url, pool_size=1, max_overflow=0, connect_args={"timeout": 30, "isolation_level": None})
    sa.event.listen(engine, "connect", lambda c, _: c.executescript(_PRAGMAS))
    sa.event.listen(engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _fits(c: sa.Connection) -> bool:
    """Whether the tables are those of this version."""
    there = sa.inspect(c)
    return all({one["name"] for one in there.get_columns(t.name)} == set(t.c.keys()) for t in TABLES.sorted_tables)


def _reason(error: Exception) -> str:
    return (str(getattr(error, "orig", None) or error) or type(error).__name__).partition("\n")[0].rstrip(".")


def _drop(c: sa.Connection, which: Any) -> None:
    c.execute(sa.delete(CHUNKS).where(CHUNKS.c.file.in_(sa.select(_F.number).where(which))))
    c.execute(sa.delete(FILES).where(which))


def _free(c: sa.Connection, holder: str | None = None) -> None:
    """End the leases of a holder, or of all."""
    for table in (ROWS, BATCHES):
        held = sa.update(table).where(table.c.lease > 0)
        c.execute((held if holder is None else held.where(table.c.holder == holder)).values(lease=0.0))


def _found(c: sa.Connection, kind: Kind, owner: str, name: str, param: str | None = None) -> sa.RowMapping:
    table = _KINDS[kind]
    found = c.execute(sa.select(table).where(table.c.id == name, table.c.owner == owner)).mappings().first()
    if found is None:
        raise NotFound(f"There is no {kind} {name[:100]!r} of this key: it may have been deleted.", param)
    return found
