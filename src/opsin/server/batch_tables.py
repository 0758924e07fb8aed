"""The tables of files and batches, and the database that has them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from opsin.core.errors import BadParameter

CHUNK = 2**20
"""Bytes of a piece of a file."""
_PRAGMAS = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA journal_size_limit=67108864"
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


class Row(NamedTuple):
    """A request of a batch, held by this server. `attempt` is how often it failed for reasons that are not its own."""

    batch: int
    n: int
    custom_id: str
    attempt: int
    owner: str
    endpoint: str
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


def connect(url: URL) -> sa.Engine:
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
