"""Files and batches of the Batch API as rows of SQLite or PostgreSQL. Every call blocks: none is for the event loop.

A file is a row and chunks of at most `CHUNK` bytes. Work is taken with a lease: whoever stops renewing it loses it to
the next server that asks, and what the loser still writes changes nothing. Times are Unix seconds.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from filelock import FileLock, Timeout
from sqlalchemy import (
    Connection,
    LargeBinary,
    RowMapping,
    and_,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from opsin.core.errors import BadParameter, QueueFull
from opsin.server.batch_tables import (
    BATCHES,
    CHUNK,
    CHUNKS,
    CLAIMED,
    DONE,
    FAILED,
    FILES,
    ROWS,
    TABLES,
    WAITING,
    Row,
    chunks,
    connect,
    read_url,
)
from opsin.server.errors import BadField, NotFound, StoreFailed

_LOG = logging.getLogger("opsin.server")
LEASE_SECONDS = 30.0
"""How long work belongs to a server that does not renew its lease."""
MAX_FILES = 10_000
"""Files of a key."""
MAX_OPEN = 100
"""Batches of a key that have not ended."""
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
_GROUP = 32  # results, or new rows times 32, that are in memory together
_KINDS = {"file": FILES, "batch": BATCHES}
Kind = Literal["file", "batch"]


class BatchStore:
    """The tables, made if there are none. Methods raise StoreFailed when the database does not do its part.

    `place` is a path for SQLite, a file for its owner alone, or the address of a database. Raises BadParameter for an
    address that cannot be used.
    """

    def __init__(self, place: Path | str) -> None:
        url = read_url(place)
        sqlite = url.drivername == "sqlite"
        self.holder = secrets.token_hex(8)
        self._owners_turn, self._ahead = "", 0.0
        self._lock: Any = Lock() if sqlite else contextlib.nullcontext()
        self._only = FileLock(f"{url.database}.lock", timeout=0, mode=0o600, thread_local=False) if sqlite else None
        try:
            self._engine = connect(url)
            self._make_tables()
        except ImportError:
            raise BadParameter("PostgreSQL needs psycopg: pip install 'opsin[postgres]'.") from None
        except (SQLAlchemyError, OSError) as error:
            reason, shown = _reason(error), url.render_as_string(hide_password=True)
            raise BadParameter(
                f"The batch store {shown} cannot be opened ({reason}): give another (--batch-store)."
            ) from None

    def _make_tables(self) -> None:
        with self._lock, self._engine.begin() as c:
            if self._only is None:
                c.execute(text("SELECT pg_advisory_xact_lock(7206319)"))  # two servers may start together
                self._ahead = float(c.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0) - time.time()
            TABLES.create_all(c)
            if self._only is not None:
                with contextlib.suppress(Timeout):  # another server on this machine has the file, too
                    self._only.acquire()
                    for table in (ROWS, BATCHES):  # whoever held them is gone
                        c.execute(update(table).where(table.c.lease > 0).values(lease=0.0))

    def close(self) -> None:
        """Let the database go."""
        self._engine.dispose()
        if self._only is not None:
            self._only.release()

    @contextlib.contextmanager
    def _begin(self) -> Iterator[Connection]:
        """A transaction; SQLite's are immediate, and one at a time."""
        try:
            with self._lock, self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            _LOG.error("the batch store failed: %s", _reason(error))
            raise StoreFailed("The store of files and batches cannot be used now: the server's log says why.") from None

    def now(self) -> float:
        """The time, by the database's clock, which its servers share."""
        return time.time() + self._ahead

    # Files and batches of one owner.

    def find(self, kind: Kind, owner: str, name: str, param: str | None = None) -> RowMapping:
        """The owner's file or batch. Raises NotFound."""
        with self._begin() as c:
            return _found(c, kind, owner, name, param)

    def page(
        self, kind: Kind, owner: str, after: str | None, limit: int, *, oldest_first: bool = False, purpose: str = ""
    ) -> tuple[Sequence[RowMapping], bool]:
        """At most `limit` of the owner's, newest first unless told otherwise, and whether there are more.

        Raises NotFound if `after` names none.
        """
        table = _KINDS[kind]
        query = select(table).where(table.c.owner == owner)
        if kind == "file":
            query = query.where(FILES.c.whole)
            query = query.where(FILES.c.purpose == purpose) if purpose else query
        number = table.c.number
        with self._begin() as c:
            if after is not None:
                last = _found(c, kind, owner, after, "after")["number"]
                query = query.where(number > last if oldest_first else number < last)
            query = query.order_by(number if oldest_first else number.desc()).limit(limit + 1)
            rows = c.execute(query).mappings().all()
        return rows[:limit], len(rows) > limit

    def put(
        self, owner: str, filename: str, pieces: Iterable[bytes], *, size: int, seconds: int, most_stored: int
    ) -> RowMapping:
        """Keep an uploaded file of `size` bytes for that long. Raises BadField when the owner has too much."""
        with self._begin() as c:
            mine = select(func.count(), func.coalesce(func.sum(FILES.c.bytes), 0)).where(FILES.c.owner == owner)
            count, stored = c.execute(mine).one()
            if count >= MAX_FILES or stored + size > most_stored:
                raise BadField(
                    f"This key has {count:,} files of {stored:,} bytes; {MAX_FILES:,} of {most_stored:,} bytes "
                    "together are the limit: delete some.",
                    "file",
                )
        number, name = self._write(owner, filename, "batch", pieces, seconds=seconds, size=size)
        with self._begin() as c:
            c.execute(update(FILES).where(FILES.c.number == number).values(whole=True))
            return _found(c, "file", owner, name)

    def _write(
        self, owner: str, filename: str, purpose: str, pieces: Iterable[bytes], *, seconds: int, size: int = 0
    ) -> tuple[int, str]:
        """Write a file that is not whole yet; its number and its id."""
        name, now = f"file-{secrets.token_hex(16)}", int(self.now())
        values = {"id": name, "owner": owner, "filename": filename, "purpose": purpose, "bytes": size, "whole": False}
        values |= {"created_at": now, "expires_at": now + seconds}
        with self._begin() as c:
            number = c.execute(insert(FILES).values(values).returning(FILES.c.number)).scalar_one()
        written = 0
        for n, data in enumerate(chunks(pieces)):
            with self._begin() as c:
                c.execute(insert(CHUNKS).values(file=number, n=n, data=data))
            written += len(data)
        with self._begin() as c:
            c.execute(update(FILES).where(FILES.c.number == number).values(bytes=written))
        return number, name

    def chunk(self, number: int, n: int) -> bytes:
        """A chunk of a file; empty behind its end."""
        with self._begin() as c:
            return c.scalar(select(CHUNKS.c.data).where(CHUNKS.c.file == number, CHUNKS.c.n == n)) or b""

    def delete_file(self, owner: str, name: str) -> None:
        """Raises NotFound, and BadField while a batch reads it."""
        with self._begin() as c:
            number = _found(c, "file", owner, name)["number"]
            reading = select(BATCHES.c.id).where(BATCHES.c.input_file_id == name, BATCHES.c.status.in_(OPEN))
            if (batch := c.scalar(reading.limit(1))) is not None:
                raise BadField(f"The file is the input of {batch}: wait for its end, or cancel it first.", "file_id")
        self._drop(FILES.c.number == number)

    def _drop(self, which: Any) -> None:
        with self._begin() as c:
            numbers = c.scalars(select(FILES.c.number).where(which)).all()
        for number in numbers:
            with self._begin() as c:
                c.execute(delete(FILES).where(FILES.c.number == number))
                c.execute(delete(CHUNKS).where(CHUNKS.c.file == number))

    def create(self, owner: str, seconds: int, **values: Any) -> RowMapping:
        """A new batch that ends after `seconds`. Raises NotFound for its input, BadField, and QueueFull."""
        now, name = int(self.now()), f"batch_{secrets.token_hex(16)}"
        with self._begin() as c:
            file = _found(c, "file", owner, values["input_file_id"], "input_file_id")
            if file["purpose"] != "batch":
                raise BadField("The input was not uploaded for a batch: upload it with purpose batch.", "input_file_id")
            open_ones = select(func.count()).where(BATCHES.c.owner == owner, BATCHES.c.status.in_(OPEN))
            if (c.scalar(open_ones) or 0) >= MAX_OPEN:
                raise QueueFull(f"This key has {MAX_OPEN} batches that have not ended, the limit: wait for one.")
            values |= {"id": name, "owner": owner, "status": "validating", "created_at": now}
            c.execute(insert(BATCHES).values(**values, expires_at=now + seconds))
            return _found(c, "batch", owner, name)

    def cancel(self, owner: str, name: str) -> RowMapping:
        """Begin no more of its requests. Raises NotFound, and BadField for a batch that has ended."""
        with self._begin() as c:
            status = _found(c, "batch", owner, name)["status"]
            if status in {"validating", "in_progress"}:
                values = {"status": "cancelling", "cancelling_at": int(self.now())}
                c.execute(update(BATCHES).where(BATCHES.c.id == name, BATCHES.c.status == status).values(values))
            elif status != "cancelling":
                raise BadField(
                    f"The batch is {status}: only one that is validated or runs can be cancelled.", "batch_id"
                )
            return _found(c, "batch", owner, name)

    # Batches that begin or end: one server at a time works on one.

    def take_batch(self) -> RowMapping | None:
        """A batch that is to be checked or ended, with a lease; None when there is none."""
        now, b = self.now(), BATCHES.c
        running = exists().where(ROWS.c.batch == b.number, ROWS.c.state == CLAIMED, ROWS.c.lease > now)
        over = and_(b.status == "in_progress", or_(b.completed + b.failed >= b.total, b.expires_at <= now))
        due = or_(b.status.in_(("validating", "finalizing")), and_(or_(over, b.status == "cancelling"), ~running))
        query = select(BATCHES).where(due, b.lease <= now).order_by(b.number).limit(1)
        with self._begin() as c:
            found = c.execute(query.with_for_update(skip_locked=True)).mappings().first()
            if found is None:
                return None
            values: dict[str, Any] = {"holder": self.holder, "lease": now + LEASE_SECONDS}
            if found["status"] == "in_progress":
                values |= {"status": "finalizing", "finalizing_at": int(now)}
            c.execute(update(BATCHES).where(b.number == found["number"]).values(values))
            return _found(c, "batch", found["owner"], found["id"])

    def lines(self, batch: RowMapping, most: int) -> Iterator[tuple[int, bytes]]:
        """The lines of its input, each with its place in the file; nothing comes after one of more than `most` bytes.

        Raises NotFound.
        """
        number = self.find("file", batch["owner"], batch["input_file_id"])["number"]
        held, start, n = bytearray(), 0, 0
        while data := self.chunk(number, n):
            searched = len(held)
            held += data
            n += 1
            while (end := held.find(b"\n", searched)) >= 0:
                yield start, bytes(held[:end])
                del held[: end + 1]
                start, searched = start + end + 1, 0
            if len(held) > most:
                break
        if held:
            yield start, bytes(held)

    def begin_rows(self, batch: RowMapping, rows: Iterable[tuple[str, int, int]]) -> int:
        """Write the rows of a batch anew, of custom_id, place and size; how many they are."""
        with self._begin() as c:
            c.execute(delete(ROWS).where(ROWS.c.batch == batch["number"]))
        count, group = 0, list[dict[str, Any]]()

        def write() -> None:
            if group:
                with self._begin() as c:
                    c.execute(insert(ROWS), group)
                group.clear()

        for count, (custom_id, start, size) in enumerate(rows, 1):
            values = {"batch": batch["number"], "n": count, "custom_id": custom_id, "start": start, "size": size}
            group.append(values)
            if len(group) == _GROUP * 32:
                write()
        write()
        return count

    def move(self, batch: RowMapping, status: str, **values: Any) -> bool:
        """Give a batch that this server holds its next status; False if it was cancelled or lost meanwhile.

        With one that is final its files become whole and its rows go.
        """
        b, values = BATCHES.c, values | {"status": status, f"{status}_at": int(self.now()), "holder": None, "lease": 0}
        mine = and_(b.number == batch["number"], b.holder == self.holder, b.status == batch["status"])
        with self._begin() as c:
            if not c.execute(update(BATCHES).where(mine).values(values)).rowcount:
                c.execute(update(BATCHES).where(b.number == batch["number"], b.holder == self.holder).values(lease=0))
                return False
            if status not in OPEN:
                made = (values.get("output_file_id"), values.get("error_file_id"))
                c.execute(update(FILES).where(FILES.c.id.in_(made)).values(whole=True))
                c.execute(delete(ROWS).where(ROWS.c.batch == batch["number"]))
            return True

    def write_results(
        self, batch: RowMapping, *, good: bool, missing: Callable[[int, str], bytes] | None = None
    ) -> str | None:
        """The id of a new file with the good or the other results, in their order; None when there are none.

        `missing` gives the line of a row that was not answered.
        """
        states = (DONE,) if good else (FAILED,) if missing is None else (FAILED, WAITING, CLAIMED)
        suffix, r = "output" if good else "error", ROWS.c

        def pieces() -> Iterator[bytes]:
            last = 0
            while True:
                mine = and_(r.batch == batch["number"], r.state.in_(states), r.n > last)
                query = select(r.n, r.custom_id, r.result).where(mine).order_by(r.n).limit(_GROUP)
                with self._begin() as c:
                    found = c.execute(query).all()
                if not found:
                    return
                for last, custom_id, result in found:
                    yield result if result is not None or missing is None else missing(last, custom_id)

        name = f"{batch['id']}_{suffix}.jsonl"
        number, file = self._write(batch["owner"], name, "batch_output", pieces(), seconds=batch["output_seconds"])
        if self.chunk(number, 0):
            return file
        self._drop(FILES.c.number == number)
        return None

    # Rows: each with one server at a time.

    def claim(self, model: str, room: int) -> list[Row]:
        """At most `room` rows for the server of that model. Owners take turns, each with its oldest batch first."""
        now, b, r = self.now(), BATCHES.c, ROWS.c
        rows: list[Row] = []
        running = select(BATCHES).where(b.status == "in_progress", b.model == model, b.expires_at > now)
        with self._begin() as c:
            batches = c.execute(running.order_by(b.number)).mappings().all()
            owners = sorted({batch["owner"] for batch in batches}, key=lambda one: (one <= self._owners_turn, one))
            for left, owner in zip(range(len(owners), 0, -1), owners, strict=True):
                share = -(-(room - len(rows)) // left)
                for batch in (batch for batch in batches if batch["owner"] == owner):
                    waiting = and_(r.batch == batch["number"], r.state == WAITING, r.lease <= now)
                    query = select(ROWS).where(waiting).order_by(r.n).limit(share)
                    found = c.execute(query.with_for_update(skip_locked=True)).mappings().all()
                    share -= len(found)
                    rows += [self._claimed(c, batch, one) for one in found]
                    if found:
                        self._owners_turn = owner
                    if not share:
                        break
        return rows

    def _claimed(self, c: Connection, batch: RowMapping, row: RowMapping) -> Row:
        where, values = _row(batch["number"], row["n"]), {"state": CLAIMED, "holder": self.holder}
        c.execute(update(ROWS).where(where).values(lease=self.now() + LEASE_SECONDS, **values))
        start, left, line = row["start"], row["size"], b""
        file = select(FILES.c.number).where(FILES.c.id == batch["input_file_id"]).scalar_subquery()
        while left:
            n, skip = divmod(start, CHUNK)
            part = func.substr(CHUNKS.c.data, skip + 1, min(left, CHUNK - skip), type_=LargeBinary)
            data = c.scalar(select(part).where(CHUNKS.c.file == file, CHUNKS.c.n == n))
            if not data:
                break  # what is left is no JSON, and becomes an error of the row
            line += data
            start, left = start + len(data), left - len(data)
        names = (batch["number"], row["n"], batch["owner"], batch["id"], batch["endpoint"])
        return Row(*names, row["custom_id"], row["attempt"], line)

    def finish(self, row: Row, result: bytes, *, good: bool) -> bool:
        """Keep a row's result, unless this server has lost the row; whether its batch has all now."""
        b = BATCHES.c
        values = {"state": DONE if good else FAILED, "result": result, "holder": None}
        with self._begin() as c:
            if not c.execute(update(ROWS).where(self._mine(row)).values(values)).rowcount:
                return False
            count = {"completed": b.completed + 1} if good else {"failed": b.failed + 1}
            c.execute(update(BATCHES).where(b.number == row.batch).values(count))
            return bool(c.scalar(select(b.completed + b.failed >= b.total).where(b.number == row.batch)))

    def give_back(self, row: Row, seconds: float, *, counted: bool) -> None:
        """Let another try a row, after that many seconds; `counted` is one attempt more."""
        values = {"state": WAITING, "holder": None, "lease": self.now() + seconds, "attempt": row.attempt + counted}
        with self._begin() as c:
            c.execute(update(ROWS).where(self._mine(row)).values(values))

    def _mine(self, row: Row) -> Any:
        return and_(_row(row.batch, row.n), ROWS.c.holder == self.holder, ROWS.c.state == CLAIMED)

    def renew(self, rows: Iterable[Row]) -> None:
        """Keep what this server holds, and let others have what a server that died held."""
        now, r = self.now(), ROWS.c
        going = select(BATCHES.c.number).where(BATCHES.c.status == "in_progress")
        with self._begin() as c:
            for row in rows:
                c.execute(update(ROWS).where(self._mine(row)).values(lease=now + LEASE_SECONDS))
            held = update(BATCHES).where(BATCHES.c.holder == self.holder, BATCHES.c.lease > 0)
            c.execute(held.values(lease=now + LEASE_SECONDS))
            lost = and_(r.batch.in_(going), r.state == CLAIMED, r.lease <= now)
            c.execute(update(ROWS).where(lost).values(state=WAITING, holder=None))

    def clean_up(self, keep_seconds: int) -> None:
        """Delete files whose time is over, what is left of broken ones, and batches that ended that long ago."""
        now, f, b = self.now(), FILES.c, BATCHES.c
        read = select(b.input_file_id).where(b.status.in_(OPEN))
        broken = and_(~f.whole, f.created_at < now - 3600)
        self._drop(and_(or_(f.expires_at <= now, broken), f.id.not_in(read)))
        with self._begin() as c:
            c.execute(delete(BATCHES).where(b.status.not_in(OPEN), b.created_at <= now - keep_seconds))


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).partition("\n")[0].rstrip(".")


def _row(batch: int, n: int) -> Any:
    return and_(ROWS.c.batch == batch, ROWS.c.n == n)


def _found(c: Connection, kind: Kind, owner: str, name: str, param: str | None = None) -> RowMapping:
    table = _KINDS[kind]
    query = select(table).where(table.c.id == name, table.c.owner == owner)
    if kind == "file":
        query = query.where(FILES.c.whole)
    found = c.execute(query).mappings().first()
    if found is None:
        raise NotFound(f"There is no {kind} {name[:100]!r} of this key: it may have been deleted.", param)
    return found
