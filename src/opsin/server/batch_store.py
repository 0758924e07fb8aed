"""Files and batches of the Batch API as rows of SQLite or PostgreSQL. Every call blocks: none is for the event loop.

A file is a row and chunks of at most `CHUNK` bytes. Work is taken with a lease: whoever stops renewing it loses it to
the next server that asks, and what the loser still writes changes nothing. Times are Unix seconds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from opsin.core.errors import BadParameter, QueueFull
from opsin.server.batch_tables import BATCHES, CHUNK, CHUNKS, FILES, ROWS, TABLES, Row, connect, read_url
from opsin.server.errors import BadField, NotFound, StoreFailed

_LOG = logging.getLogger("opsin.server")
LEASE_SECONDS = 30.0
"""How long work belongs to a server that does not renew its lease."""
MAX_FILES = 10_000
"""Files of a key."""
MAX_OPEN = 100
"""Batches of a key that have not ended."""
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
_KINDS = {"file": FILES, "batch": BATCHES}
_RESULTS = {"yield_per": 32}  # so many are in memory together
Kind = Literal["file", "batch"]


class BatchStore:
    """The tables, made if there are none. Methods raise StoreFailed when the database does not do its part.

    `place` is a path for SQLite, a file for its owner alone, or the address of a database. Raises BadParameter for an
    address that cannot be used.
    """

    def __init__(self, place: Path | str) -> None:
        url = read_url(place)
        self.holder = secrets.token_hex(8)
        self._owners_turn, self._ahead = "", 0.0
        try:
            self._engine = connect(url)
            with self._engine.begin() as c:
                self._make_tables(c)
        except ImportError:
            raise BadParameter("PostgreSQL needs psycopg: pip install 'opsin[postgres]'.") from None
        except (SQLAlchemyError, OSError) as error:
            reason, shown = _reason(error), url.render_as_string(hide_password=True)
            raise BadParameter(
                f"The batch store {shown} cannot be opened ({reason}): give another (--batch-store)."
            ) from None

    def _make_tables(self, c: sa.Connection) -> None:
        if postgresql := c.dialect.name != "sqlite":
            c.execute(sa.text("SELECT pg_advisory_xact_lock(7206319)"))  # two servers may start together
            self._ahead = float(c.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp())")) or 0) - time.time()
        TABLES.create_all(c)
        if not postgresql:
            _free(c)  # whoever held them is gone; another server that has the file, too, only does some work twice

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
        except (SQLAlchemyError, OSError) as error:
            _LOG.error("the batch store failed: %s", _reason(error))
            raise StoreFailed("The store of files and batches cannot be used now: the server's log says why.") from None

    def now(self) -> float:
        """The time, by the database's clock, which its servers share."""
        return time.time() + self._ahead

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
            query = query.where(FILES.c.purpose == purpose)
        with self._begin() as c:
            if after is not None:
                last = _found(c, kind, owner, after, "after")["number"]
                query = query.where(number > last if oldest_first else number < last)
            query = query.order_by(number if oldest_first else number.desc()).limit(limit + 1)
            rows = c.execute(query).mappings().all()
        return rows[:limit], len(rows) > limit

    def put(self, owner: str, filename: str, file: IO[bytes], *, seconds: int, most_stored: int) -> sa.RowMapping:
        """Keep an uploaded file for that long. Raises BadField when the owner has too much."""
        mine = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(FILES.c.bytes), 0)).where(FILES.c.owner == owner)
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
        now = int(self.now())
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
            reading = sa.select(BATCHES.c.id).where(BATCHES.c.input_file_id == name, BATCHES.c.status.in_(OPEN))
            if (batch := c.scalar(reading.limit(1))) is not None:
                raise BadField(f"The file is the input of {batch}: wait for its end, or cancel it first.", "file_id")
            _drop(c, FILES.c.number == number)

    def create(self, owner: str, seconds: int, **values: Any) -> sa.RowMapping:
        """A new batch that ends after `seconds`. Raises NotFound for its input, BadField, and QueueFull."""
        now = int(self.now())
        values |= {"id": f"batch_{secrets.token_hex(16)}", "owner": owner, "status": "validating", "created_at": now}
        with self._begin() as c:
            file = _found(c, "file", owner, values["input_file_id"], "input_file_id")
            if file["purpose"] != "batch":
                raise BadField("The input was not uploaded for a batch: upload it with purpose batch.", "input_file_id")
            open_ones = sa.select(sa.func.count()).where(BATCHES.c.owner == owner, BATCHES.c.status.in_(OPEN))
            if (c.scalar(open_ones) or 0) >= MAX_OPEN:
                raise QueueFull(f"This key has {MAX_OPEN} batches that have not ended, the limit: wait for one.")
            made = sa.insert(BATCHES).values(**values, expires_at=now + seconds).returning(BATCHES)
            return c.execute(made).mappings().one()

    def cancel(self, owner: str, name: str) -> sa.RowMapping:
        """Begin no more of its requests. Raises NotFound, and BadField for a batch that has ended."""
        values = {"status": "cancelling", "cancelling_at": int(self.now()), "holder": None, "lease": 0.0}
        with self._begin() as c:
            which = sa.and_(BATCHES.c.id == name, BATCHES.c.owner == owner)
            c.execute(
                sa.update(BATCHES).where(which, BATCHES.c.status.in_(("validating", "in_progress"))).values(values)
            )
            batch = _found(c, "batch", owner, name)
        if batch["status"] != "cancelling":
            said = f"The batch is {batch['status']}: only one that is validated or runs can be cancelled."
            raise BadField(said, "batch_id")
        return batch

    # Batches that begin or end: one server at a time works on one.

    def take_batch(self) -> sa.RowMapping | None:
        """A batch that is to be checked or ended, with a lease; None when there is none.

        One that this server holds already comes last: its work has failed.
        """
        now, b = self.now(), BATCHES.c
        running = sa.exists().where(ROWS.c.batch == b.number, ROWS.c.good.is_(None), ROWS.c.lease > now)
        over = sa.and_(b.status == "in_progress", sa.or_(b.completed + b.failed >= b.total, b.expires_at <= now))
        due = sa.or_(
            b.status.in_(("validating", "finalizing")), sa.and_(sa.or_(over, b.status == "cancelling"), ~running)
        )
        free = sa.or_(b.lease <= now, b.holder == self.holder)
        first = sa.select(b.number).where(due, free).order_by(b.lease, b.number).limit(1)
        began = b.status == "in_progress"
        values = {
            "holder": self.holder,
            "lease": now + LEASE_SECONDS,
            "status": sa.case((began, "finalizing"), else_=b.status),
            "finalizing_at": sa.case((began, int(now)), else_=b.finalizing_at),
        }
        with self._begin() as c:
            number = first.with_for_update(skip_locked=True).scalar_subquery()
            taken = sa.update(BATCHES).where(b.number == number).values(values).returning(BATCHES)
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

    def move(self, batch: sa.RowMapping, status: str, rows: Iterable[tuple[str, int, int]] = (), **values: Any) -> None:
        """Give a batch that this server holds its next status, and `rows` of custom_id, place and size.

        Raises StoreFailed if it was cancelled or lost meanwhile.
        """
        new = [
            {"batch": batch["number"], "n": n, "custom_id": name, "start": start, "size": size}
            for n, (name, start, size) in enumerate(rows)
        ]
        with self._begin() as c:
            if new:
                c.execute(sa.insert(ROWS), new)
            self._move(c, batch, status, {**values, "total": len(new)})

    def _move(self, c: sa.Connection, batch: sa.RowMapping, status: str, values: dict[str, Any]) -> None:
        b = BATCHES.c
        mine = sa.and_(b.number == batch["number"], b.holder == self.holder, b.status == batch["status"])
        values |= {"status": status, f"{status}_at": int(self.now()), "holder": None, "lease": 0.0}
        if not c.execute(sa.update(BATCHES).where(mine).values(values)).rowcount:
            raise StoreFailed(f"{batch['id']} was cancelled, or another server has it now.")

    def end(
        self, batch: sa.RowMapping, status: str, missing: Callable[[str], bytes] | None = None, **values: Any
    ) -> None:
        """Give a batch its last status and its files, which have the results in the order of their rows.

        `missing` gives the line of a row without a result, by its custom_id. Raises StoreFailed as `move` does.
        """
        r = ROWS.c
        mine = sa.select(r.custom_id, r.good, r.result).where(r.batch == batch["number"]).order_by(r.n)
        with self._begin() as c, TemporaryFile() as output, TemporaryFile() as error:
            for row in c.execute(mine, execution_options=_RESULTS):
                if row.good is not None:
                    (output if row.good else error).write(row.result)
                elif missing is not None:
                    error.write(missing(row.custom_id))
            for kind, file in (("output", output), ("error", error)):
                if file.tell():
                    names = {"filename": f"{batch['id']}_{kind}.jsonl", "purpose": "batch_output"}
                    made = self._write(c, file, batch["output_seconds"], owner=batch["owner"], **names)
                    values[f"{kind}_file_id"] = made["id"]
            c.execute(sa.delete(ROWS).where(r.batch == batch["number"]))
            self._move(c, batch, status, values)

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
        now, b, r = self.now(), BATCHES.c, ROWS.c
        waiting = sa.and_(r.batch == b.number, r.good.is_(None), r.lease <= now)
        going = sa.and_(b.status == "in_progress", b.model == model, b.expires_at > now, sa.exists().where(waiting))
        order = (b.owner <= self._owners_turn, b.owner, b.number)
        batch = c.execute(sa.select(BATCHES).where(going).order_by(*order).limit(1)).mappings().first()
        if batch is None:
            return None
        which = sa.and_(r.batch == batch["number"], r.good.is_(None), r.lease <= now)
        n = sa.select(r.n).where(which).order_by(r.n).limit(1).with_for_update(skip_locked=True).scalar_subquery()
        values = {"holder": self.holder, "lease": now + LEASE_SECONDS}
        taken = sa.update(ROWS).where(r.batch == batch["number"], r.n == n).values(values).returning(ROWS)
        if (row := c.execute(taken).mappings().first()) is None:
            return None  # another server takes it at this moment
        first, skip = divmod(row["start"], CHUNK)
        f, k = FILES.c, CHUNKS.c
        part = sa.func.substr(k.data, sa.case((k.n == first, skip + 1), else_=1), row["size"], type_=sa.LargeBinary)
        among = k.n.between(first, (row["start"] + row["size"] - 1) // CHUNK)
        parts = sa.select(part).where(f.id == batch["input_file_id"], k.file == f.number, among).order_by(k.n)
        line = b"".join(c.scalars(parts))[: row["size"]]
        same = {name: row[name] for name in ("batch", "n", "custom_id", "attempt")}
        return Row(**same, owner=batch["owner"], endpoint=batch["endpoint"], line=line)

    def finish(self, row: Row, result: bytes, *, good: bool) -> bool:
        """Keep a row's result, unless this server has lost the row; whether its batch has all now."""
        b = BATCHES.c
        count = b.completed if good else b.failed
        with self._begin() as c:
            if not c.execute(sa.update(ROWS).where(self._mine(row)).values(good=good, result=result)).rowcount:
                return False
            counted = sa.update(BATCHES).where(b.number == row.batch).values({count: count + 1})
            return bool(c.scalar(counted.returning(b.completed + b.failed >= b.total)))

    def give_back(self, row: Row, seconds: float, *, counted: bool) -> None:
        """Let another try a row, after that many seconds; `counted` is one attempt more."""
        values = {"holder": None, "lease": self.now() + seconds, "attempt": row.attempt + counted}
        with self._begin() as c:
            c.execute(sa.update(ROWS).where(self._mine(row)).values(values))

    def _mine(self, row: Row) -> Any:
        r = ROWS.c
        return sa.and_(r.batch == row.batch, r.n == row.n, r.holder == self.holder, r.good.is_(None))

    def renew(self, rows: Iterable[Row]) -> None:
        """Keep `rows` and the batch that this server works on."""
        b = BATCHES.c
        held = [sa.update(ROWS).where(self._mine(row)) for row in rows]
        held.append(sa.update(BATCHES).where(b.holder == self.holder))
        with self._begin() as c:
            for one in held:
                c.execute(one.values(lease=self.now() + LEASE_SECONDS))

    def clean_up(self, keep_seconds: int) -> None:
        """Delete files whose time is over, and batches that ended that long ago."""
        now, b = self.now(), BATCHES.c
        read = sa.select(b.input_file_id).where(b.status.in_(OPEN))
        with self._begin() as c:
            _drop(c, sa.and_(FILES.c.expires_at <= now, FILES.c.id.not_in(read)))
            c.execute(sa.delete(BATCHES).where(b.status.not_in(OPEN), b.created_at <= now - keep_seconds))


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).partition("\n")[0].rstrip(".")


def _drop(c: sa.Connection, which: Any) -> None:
    c.execute(sa.delete(CHUNKS).where(CHUNKS.c.file.in_(sa.select(FILES.c.number).where(which))))
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
