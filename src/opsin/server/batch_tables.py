"""The tables of files and batches, and the database that has them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from opsin.core.errors import BadParameter

CHUNK = 2**20
"""Bytes of a piece of a file."""
WAITING, CLAIMED, DONE, FAILED = range(4)
"""States of a row."""
_NUMBER = BigInteger().with_variant(Integer, "sqlite")
TABLES = MetaData()
FILES = Table(
    "opsin_files",
    TABLES,
    Column("number", _NUMBER, primary_key=True),
    Column("id", String(64), unique=True, nullable=False),
    Column("owner", String(64), index=True, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("whole", Boolean, nullable=False),
)
CHUNKS = Table(
    "opsin_chunks",
    TABLES,
    Column("file", _NUMBER, primary_key=True, autoincrement=False),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)
_MOMENTS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
BATCHES = Table(
    "opsin_batches",
    TABLES,
    Column("number", _NUMBER, primary_key=True),
    Column("id", String(64), unique=True, nullable=False),
    Column("owner", String(64), index=True, nullable=False),
    Column("model", Text, nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("metadata", JSON(none_as_null=True)),
    Column("errors", JSON(none_as_null=True)),
    Column("status", String(16), index=True, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    *(Column(f"{moment}_at", BigInteger) for moment in _MOMENTS),
    Column("total", Integer, nullable=False, default=0),
    Column("completed", Integer, nullable=False, default=0),
    Column("failed", Integer, nullable=False, default=0),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("output_seconds", BigInteger, nullable=False),
    Column("holder", String(64)),
    Column("lease", Float, nullable=False, default=0.0),
)
ROWS = Table(
    "opsin_rows",
    TABLES,
    Column("batch", _NUMBER, primary_key=True, autoincrement=False),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("custom_id", Text, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("size", Integer, nullable=False),
    Column("state", Integer, nullable=False, default=WAITING),
    Column("attempt", Integer, nullable=False, default=0),
    Column("holder", String(64)),
    Column("lease", Float, nullable=False, default=0.0),
    Column("result", LargeBinary),
    Index("opsin_rows_by_state", "batch", "state", "n"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A request of a batch, held by this server. `attempt` is how often it failed for reasons that are not its own."""

    batch: int
    n: int
    owner: str
    batch_id: str
    endpoint: str
    custom_id: str
    attempt: int
    line: bytes


def read_url(place: Path | str) -> URL:
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


def connect(url: URL) -> Engine:
    """The database; SQLite's is a file for its owner alone, made if it is not there. Raises OSError, ImportError."""
    if url.drivername != "sqlite":
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    file = Path(url.database or "")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    engine = create_engine(url, connect_args={"timeout": 30})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by hand
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "journal_size_limit=67108864"):
        connection.execute(f"PRAGMA {pragma}").close()


def chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of `CHUNK`, of which the last may be smaller."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= CHUNK:
            yield bytes(held[:CHUNK])
            del held[:CHUNK]
    if held:
        yield bytes(held)
