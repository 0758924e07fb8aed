"""Rows of tables: JSON Lines, OpenAI's batch form among them, CSV and Parquet."""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from opsin.core.errors import BadInput
from opsin.images.source import show
from opsin.jobs.files import clean, is_address, open_file, reading
from opsin.jobs.item import ImageRef, Item, Source
from opsin.jobs.output import import_arrow

MAX_ROW = 2**26
"""Bytes of one row of text."""
IMAGE_COLUMNS = ("image", "image_path", "path", "file", "filename", "file_name", "url", "image_url", "images")
_LOOKED_AT = 100  # rows that tell the columns of JSON Lines
_COUNTED = 2**26  # bytes of files that are read once more to count their rows
_BATCH_BYTES, _BATCH_ROWS = 2**30, 1024

Cells = Mapping[str, Any]
Rows = Iterator[tuple[int, Cells | ValueError]]
"""The line or row in a file, and its cells, or what is wrong with it as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Files with rows of one kind. `image` and `id` are columns; `image` is None for OpenAI's batch form."""

    names: Sequence[str]
    rows: Callable[[str], Rows]
    image: str | None
    id: str | None

    def items(self) -> Iterator[Item]:
        """The rows, numbered over all files."""
        number = 0
        for name in self.names:
            with reading(name):
                for place, cells in self.rows(name):
                    number += 1
                    yield self._item(name, place, number, cells)

    def _item(self, name: str, place: int, number: int, cells: Cells | ValueError) -> Item:
        key, source = str(number) if self.id is None else f"row {number}", f"{clean(name)}#{place}"
        try:
            if isinstance(cells, ValueError):
                raise cells
            if self.image is None:
                return Item(name_of(cells, "custom_id"), source, body=_body(cells))
            key = key if self.id is None else name_of(cells, self.id)
            images = tuple(_images(cells.get(self.image)))
        except ValueError as error:
            counted = "Row" if self.rows is parquet_rows else "Line"
            return Item(key, source, error=BadInput(f"{counted} {place} of {show(name)} {error}."))
        if isinstance(images[0], str) and images[0][:5].lower() != "data:":
            source = clean(images[0])
        columns = {column: cells[column] for column in cells if column != self.image or isinstance(cells[column], str)}
        return Item(key, source, tuple(_beside(name, image) for image in images), columns)


def open_table(rows: Callable[[str], Rows], names: Sequence[str], image: str | None, row_id: str | None) -> Source:
    """Files of one kind, the parts of one table; its image column is found by its name unless it is given.

    Raises BadInput, and what `reading` knows.
    """
    columns, total = _parquet_head(names) if rows is parquet_rows else _text_head(rows, names)
    if rows is json_rows and {"custom_id", "body"} <= columns.keys():
        return Source(_Table(names, rows, None, "custom_id").items, total, is_requests=True)
    table, there = show(names[0]), f"it has {', '.join(map(show, columns))}"
    if total == 0 or not columns:
        raise BadInput(f"{table} holds no rows that can be read: check its format.")
    for column in filter(None, (image, row_id)):
        if column not in columns:
            raise BadInput(f"{table} has no column {show(column)}: {there}.")
    folded = {column.casefold(): column for column in reversed(columns)}
    found = image or next((folded[name] for name in IMAGE_COLUMNS if name in folded), None)
    if found is None:
        raise BadInput(f"No column of {table} is named like images: say which with --image-column; {there}.")
    note = "" if image else f"(images are taken from the column {found!r}; --image-column takes another)"
    return Source(_Table(names, rows, found, row_id).items, total, tuple(columns), note=note)


def _text_head(rows: Callable[[str], Rows], names: Sequence[str]) -> tuple[dict[str, None], int | None]:
    """The columns, and how many rows there are where it takes little time to read them once more."""
    columns = dict[str, None]()
    for _, cells in islice(rows(names[0]), _LOOKED_AT):
        columns |= {} if isinstance(cells, ValueError) else dict.fromkeys(cells)
    if any(map(is_address, names)) or sum(Path(name).stat().st_size for name in names) > _COUNTED:
        return columns, None
    return columns, sum(1 for name in names for _ in rows(name))


def _parquet_head(names: Sequence[str]) -> tuple[dict[str, None], int]:
    columns, total = dict[str, None](), 0
    for name in names:
        with open_file(name) as file, _open_parquet(file) as parquet:
            total += parquet.metadata.num_rows
            columns = columns or dict.fromkeys(parquet.schema_arrow.names)
    return columns, total


def name_of(cells: Cells, column: str) -> str:
    """The id of a row. Raises ValueError with the end of a sentence."""
    value = cells.get(column)
    if value is None or value == "" or isinstance(value, (bytes, list, dict)):
        raise ValueError(f"has no id in {column!r}: give each row its own")
    return clean(str(value))


def _body(cells: Cells) -> Cells:
    body = cells.get("body")
    if not isinstance(body, dict) or not str(cells.get("url")).endswith("/chat/completions"):
        raise ValueError("is no chat request: give the url /v1/chat/completions and a body that is a JSON object")
    return body


def _images(value: Any) -> Iterator[ImageRef]:
    """The images of a cell. Raises ValueError with the end of a sentence."""
    if isinstance(value, str) and value[:1] == "[":  # a list in a cell of CSV, or a path
        with suppress(ValueError):
            value = from_json(value)
    for one in value if value and isinstance(value, list) else [value]:
        image = one
        if isinstance(one, dict):  # as Hugging Face keeps images: where there are bytes, the path names no file
            image = one["bytes"] if isinstance(one.get("bytes"), bytes) else one.get("path")
        if not isinstance(image, (str, bytes)) or not image.strip():
            raise ValueError("has no image in its cell: give a path, an address or bytes")
        yield image


def _beside(name: str, image: ImageRef) -> ImageRef:
    """A path in a table is relative to the table's folder."""
    if not isinstance(image, str) or is_address(image) or image.startswith(("/", "~")):
        return image
    folder, slash, _ = name.rpartition("/")
    return f"{folder}{slash}{image}"


class _Lines:
    """Lines of text, and the rows that are made of them, of at most MAX_ROW bytes each; both go on after an error."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, self._number, self._left = file, 0, MAX_ROW

    def next(self) -> str:
        """The next line, "" at the end. Raises ValueError where it is no text, or its row too long."""
        line = self._file.readline(self._left + 1)
        self._number += bool(line)
        self._left -= len(line)
        if self._left < 0:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(MAX_ROW)
            raise ValueError(f"more than {MAX_ROW:,} bytes")
        return line.decode("utf-8-sig" if self._number == 1 else "utf-8")

    def rows(self, rows: Iterator[Cells | None]) -> Rows:
        """Those of `rows` that are not None, with the number of their last line."""
        while True:
            self._left = MAX_ROW
            try:
                if (cells := next(rows)) is not None:
                    yield self._number, cells
            except StopIteration:
                return
            except (ValueError, csv.Error) as error:
                yield self._number, ValueError(f"cannot be read ({error}): correct it")


def json_object(line: str) -> Cells | None:
    """The JSON object in a line, None in an empty one. Raises ValueError."""
    if not line.strip():
        return None
    if isinstance(cells := from_json(line), dict):
        return cells
    raise ValueError("no JSON object")


def json_rows(name: str) -> Rows:
    """JSON Lines."""
    with open_file(name) as file:
        lines = _Lines(file)
        yield from lines.rows(map(json_object, iter(lines.next, "")))


def csv_rows(name: str) -> Rows:
    """CSV in UTF-8 with a header, separated by comma, semicolon or tab. Raises BadInput for the header."""
    csv.field_size_limit(MAX_ROW)
    with open_file(name) as file:
        lines = _Lines(file)
        try:
            head = lines.next()
            delimiter = max("\t,;", key=re.sub('"[^"]*"', "", head).count)
            rows = csv.DictReader(chain([head], iter(lines.next, "")), delimiter=delimiter)
            rows.fieldnames = [column.strip() for column in rows.fieldnames or ()]
        except (ValueError, csv.Error) as error:
            raise BadInput(f"{show(name)} has no header that can be read ({error}): give a table in UTF-8.") from None
        yield from lines.rows(map(_cells, rows))


def _cells(row: dict[Any, Any]) -> Cells:
    if any(row.pop(None, ())):
        raise ValueError("more cells than columns, so a text needs quotes")
    return row


def _open_parquet(file: BufferedReader) -> Any:
    _, parquet = import_arrow()
    return parquet.ParquetFile(file, buffer_size=2**20)


def parquet_rows(name: str) -> Rows:
    """Parquet."""
    with open_file(name) as file, _open_parquet(file) as parquet:
        about, done = parquet.metadata, 0
        groups = map(about.row_group, range(about.num_row_groups))
        chunks = (group.column(number) for group in groups for number in range(group.num_columns))
        # A value is at most as large as all that its group stores, and a dictionary may repeat it in each row.
        largest = max((one.total_uncompressed_size for one in chunks if one.physical_type == "BYTE_ARRAY"), default=0)
        size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, largest)))
        with suppress(OSError, ValueError, NotImplementedError):
            for batch in parquet.iter_batches(size, use_threads=False):
                for cells in batch.to_pylist():
                    done += 1
                    yield done, cells
        for number in range(done, about.num_rows):  # so that rows of later files keep their numbers
            yield number + 1, ValueError("cannot be read: the file is damaged or encrypted from here on")
