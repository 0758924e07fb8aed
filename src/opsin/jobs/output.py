"""Where rows go: JSON Lines and CSV grow row by row; Parquet is written at the end from rows that the ledger keeps."""

import csv
import importlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from opsin.core.errors import BadParameter, OpsinError
from opsin.core.files import replacing
from opsin.jobs.ledger import HOLES, Ledger
from opsin.jobs.row import AFTER, BEFORE, COUNTS, TIMES, Row, columns, flat, from_flat

ENDINGS = (".jsonl", ".ndjson", ".csv", ".parquet")
_MOVING = "moving"
_ROWS_AT_ONCE = 1_000
# A cell that begins so is a formula for spreadsheets; source: OWASP, CSV Injection.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_MEND = "free some space or check the folder, and run the same command again"


class OutputFailed(OpsinError):
    """The output cannot be written."""


@contextmanager
def writing(what: object, then: str = _MEND) -> Iterator[None]:
    """What the disk refuses becomes OutputFailed, with what was written, and what to do `then`."""
    try:
        yield
    except OSError as error:
        raise OutputFailed(f"{what} cannot be written ({error.strerror or error}): {then}.") from None


class Output:
    """Rows that are appended to a file, which has `fields` of a schema. `size` is its bytes with all rows added.

    Raises OutputFailed, after which the file is as it was at the last `flush`.
    """

    def __init__(self, path: Path, fields: Mapping[str, str], ledger: Ledger) -> None:
        self.path, self._fields, self._ledger = path, fields, ledger
        self._new = path.with_name(f"{path.name}.opsin-new")
        self._waiting = bytearray()
        with self._writing():
            if ledger.note(_MOVING) == "1":
                self._replace()
            self._file = path.open("r+b" if path.exists() else "w+b")
            self.size = self._recover()
            if self.size == 0:
                self._waiting += self._head()
                self.size = len(self._waiting)
        if ledger.note(HOLES) == "1":
            self._waiting.clear()
            self.rewrite(by_input=False)

    def add(self, row: Row) -> tuple[int | None, int | None, bytes | None]:
        """Put a row at the end: its place and length in bytes, or the row as the ledger keeps it."""
        line, at = self._line(row), self.size
        self._waiting += line
        self.size += len(line)
        return at, len(line), None

    def flush(self) -> None:
        """Write what was added, down to the disk."""
        begin = self.size - len(self._waiting)
        with self._writing():
            try:
                self._file.seek(begin)
                self._file.write(self._waiting)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError:
                self.size = begin
                self._waiting.clear()
                with suppress(OSError):  # what is behind is cut off when the job goes on
                    self._file.truncate(begin)
                raise
        self._waiting.clear()

    def read(self, at: int | None, length: int | None, stored: bytes | None) -> Row:
        """A row that was added and flushed. Raises ValueError where there is none."""
        if stored is None:
            self._file.seek(at or 0)
            stored = self._file.read(length)
        return self._row(stored)

    def finish(self, *, by_input: bool) -> None:
        """Bring the rows into the order of the input, if that is asked for."""
        if by_input and not self._ledger.in_order():
            self.rewrite(by_input=True)

    def rewrite(self, *, by_input: bool) -> None:
        """Write the file anew with the rows that the ledger has in it, and nothing else."""
        head = self._head()
        with self._writing():
            with self._new.open("wb") as file:
                file.write(head)
                for at, length in self._ledger.places(by_input=by_input):
                    self._file.seek(at)
                    file.write(self._file.read(length))
                file.flush()
                os.fsync(file.fileno())
            # The ledger is first: whatever happens after it, the file is replaced when the job goes on.
            self.size = self._ledger.move(len(head), _MOVING, by_input=by_input)
            self._file.close()
            self._replace()
            self._file = self.path.open("r+b")

    def close(self) -> None:
        """Close the file; what was not flushed is lost."""
        self._file.close()

    def _replace(self) -> None:
        if self._new.exists():
            self._new.replace(self.path)
        self._ledger.take_note(_MOVING, "0")

    def _recover(self) -> int:
        """Make file and ledger agree: the shorter one counts."""
        there, noted = self.path.stat().st_size, int(self._ledger.note("size") or 0)
        if there < noted:  # it lost its end with the power, or was deleted
            self._ledger.forget_after(there)
        last = self._ledger.query("SELECT at, at + length FROM rows WHERE at IS NOT NULL ORDER BY at DESC LIMIT 1")
        begin, end = last[0] if last else (0, 0)
        ends = [self._file.read(1) for place in (begin, end) if place and self._file.seek(place - 1) >= 0]
        if any(one != b"\n" for one in ends):
            self._file.close()
            raise OutputFailed(
                f"{self.path} was changed by another program, so its rows are not where the ledger has them: give "
                "another output, or --overwrite to start over."
            )
        self._file.truncate(end)
        return int(end)

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.path, f"the rows until now are there; {_MEND}")

    def _head(self) -> bytes:
        return b""

    def _line(self, row: Row) -> bytes:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")

    def _row(self, line: bytes) -> Row:
        row: Row = json.loads(line)
        return row


class CsvOutput(Output):
    """Rows of a table. What a spreadsheet would take for a formula gets an apostrophe before it."""

    def _head(self) -> bytes:
        return _csv(columns(self._fields))

    def _line(self, row: Row) -> bytes:
        cells = [json.dumps(cell) if isinstance(cell, bool) else cell for cell in flat(row, self._fields)]
        return _csv([f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in cells])

    def _row(self, line: bytes) -> Row:
        cells = next(csv.reader(io.StringIO(line.decode(), newline="")))
        cells = [cell[1:] if cell[:1] == "'" and cell[1:2] in _FORMULA else cell for cell in cells]
        return from_flat(cells, self._fields)


class StoredOutput(Output):
    """Rows that the ledger keeps until the end; without a path they stay there."""

    def __init__(self, path: Path | None, fields: Mapping[str, str], ledger: Ledger) -> None:
        self._target, self._fields, self._ledger, self.size = path, fields, ledger, 0

    def add(self, row: Row) -> tuple[int | None, int | None, bytes | None]:
        """The row as the ledger keeps it."""
        return None, None, json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")

    def flush(self) -> None:
        """The ledger's commit is what counts."""

    def finish(self, *, by_input: bool) -> None:
        """Write the Parquet file, if there is one."""
        if self._target is None:
            return
        _, parquet = import_arrow()
        schema, stored = table_schema(self._fields), self._ledger.stored(by_input=by_input)
        with (
            writing(self._target, f"its ledger has all rows; {_MEND}"),
            replacing(self._target, 0o644) as part,
            parquet.ParquetWriter(part, schema) as writer,
        ):
            while rows := [flat(json.loads(row), self._fields) for row in islice(stored, _ROWS_AT_ONCE)]:
                writer.write_table(table(rows, schema))

    def close(self) -> None:
        """Nothing is open."""


def import_arrow() -> tuple[Any, Any]:
    """The module pyarrow and its Parquet part. Raises BadParameter where it is not installed."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise BadParameter("Parquet needs pyarrow: pip install 'opsin[batch]', or use JSONL or CSV.") from None


def table_schema(fields: Mapping[str, str]) -> Any:
    """The Arrow schema of a table with these fields. Raises BadParameter without pyarrow."""
    arrow, _ = import_arrow()
    kinds = {"integer": arrow.int64(), "number": arrow.float64(), "boolean": arrow.bool_()}
    known = dict.fromkeys((*COUNTS, "attempt"), "integer") | dict.fromkeys(TIMES, "number")
    before, after = ([known.get(name, "string") for name in names] for names in (BEFORE, AFTER))
    types = [kinds.get(kind, arrow.string()) for kind in (*before, *fields.values(), *after)]
    return arrow.schema(list(zip(columns(fields), types, strict=True)))


def table(rows: Sequence[Sequence[Any]], schema: Any) -> Any:
    """An Arrow table of flat rows, at least one."""
    arrow, _ = import_arrow()
    arrays = []
    for column, field in zip(zip(*rows, strict=True), schema, strict=True):
        cells = list(column)
        if field.type == arrow.string():
            cells = [cell if cell is None else str(cell) for cell in column]
        try:
            arrays.append(arrow.array(cells, field.type))
        except (arrow.ArrowInvalid, arrow.ArrowTypeError, OverflowError):  # an answer that does not fit: see `text`
            arrays.append(arrow.array([_fitting(arrow, cell, field.type) for cell in cells], field.type))
    return arrow.Table.from_arrays(arrays, schema=schema)


def _fitting(arrow: Any, cell: Any, kind: Any) -> Any:
    try:
        return arrow.scalar(cell, kind).as_py()
    except (arrow.ArrowInvalid, arrow.ArrowTypeError, OverflowError):
        return None


def _csv(cells: Sequence[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "replace")
