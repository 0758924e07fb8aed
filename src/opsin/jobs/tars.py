"""Rows of WebDataset tars: files that share a name up to its first dot are one row. Nothing in a tar is unpacked."""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import islice
from typing import IO, Any, Literal, Self, cast

from opsin.core.errors import BadInput
from opsin.images import ENDINGS
from opsin.images.source import show
from opsin.jobs.files import clean, is_address, open_file, reading
from opsin.jobs.item import FilePart, ImageRef, Item, Source
from opsin.jobs.tables import json_object, name_of

MOST_BYTES = 2**26
"""Of a file in a tar that is read into memory."""
_LOOKED_AT = 16  # rows that tell the columns
_BROKEN = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, RecursionError)


def open_tars(names: Sequence[str], image: str | None, row_id: str | None) -> Source:
    """The shards of a WebDataset; `image` is the ending of the images to take. Raises BadInput."""
    skipped: Counter[str] = Counter()

    def items() -> Generator[Item]:
        skipped.clear()
        for name in names:
            with reading(name):
                yield from _Shard(name, image, row_id, skipped).items()

    with closing(items()) as rows:
        first = list(islice(rows, _LOOKED_AT))
    if not first:
        raise BadInput(f"{show(names[0])} holds no images that can be read: give a WebDataset with some.")
    if len(first) < _LOOKED_AT and (wrong := first[0].error) and all(item.error for item in first):
        raise wrong
    columns = dict.fromkeys(column for item in first for column in item.columns)
    return Source(items, columns=tuple(columns), skipped=skipped)


@dataclass(slots=True)
class _Row:
    """The files of one key, as far as they were met. `ending` is that of the image."""

    key: str
    ending: str = ""
    image: ImageRef | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    wrong: str = ""


class _Member(tarfile.TarInfo):
    """A header that asks for no memory beyond reason, and leads forwards."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.size > MOST_BYTES and not member.isreg()):
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member


class _Shard:
    """One tar. See `open_tars`."""

    def __init__(self, name: str, image: str | None, row_id: str | None, skipped: Counter[str]) -> None:
        self._name, self._id, self._skipped = name, row_id, skipped
        self._image = image and image.lower().lstrip(".")

    def items(self) -> Iterator[Item]:
        """The rows; where the tar is damaged, an error row is the last."""
        row = _Row("")
        try:
            with open_file(self._name) as file:
                for tar, member in _members(file):
                    folder, slash, base = member.name.removeprefix("./").rpartition("/")
                    stem, _, ending = base.partition(".")
                    if not member.isreg() or member.issparse() or not stem:
                        continue  # folders, links, hidden files
                    if row.key != (key := folder + slash + stem):
                        yield from self._items(row)
                        row = _Row(key)
                    self._take(row, tar, member, ending.lower())
        except _BROKEN as error:
            name, key, why = show(self._name), clean(row.key or self._name), show(str(error).rstrip("."))
            wrong = BadInput(f"{name} cannot be read as a tar at {show(key)} ({why}): copy it again.")
            yield Item(key, clean(f"{self._name}#{row.key}"), error=wrong)
        else:
            yield from self._items(row)

    def _take(self, row: _Row, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> None:
        last = f".{ending.rpartition('.')[2]}"
        is_image = last in ENDINGS if self._image is None else ending == self._image
        # 1.jpg is the image also where 1.depth.png is before it.
        if is_image and row.image is not None and ("." in ending or "." not in row.ending):
            is_image = False
        if not is_image and ending not in {"json", "txt"}:
            self._skipped[last if ending else "without an ending"] += 1
            return
        if is_image and isinstance(tar.fileobj, BufferedReader) and not is_address(self._name):
            row.image, row.ending = FilePart(self._name, member.offset_data, member.size), ending
            return
        if member.size > MOST_BYTES:
            row.wrong = f"holds a file of more than {MOST_BYTES:,} bytes, {show(member.name)}: make it smaller"
            return
        data = cast("IO[bytes]", tar.extractfile(member)).read()
        if is_image:
            row.image, row.ending = data, ending
        elif ending == "txt":
            row.columns["caption"] = data.decode("utf-8", "replace").strip()
        else:
            try:
                row.columns = {**(json_object(data.decode()) or {}), **row.columns}
            except ValueError as error:
                row.wrong = f"holds {show(member.name)}, which cannot be read ({error}): correct it"

    def _items(self, row: _Row) -> Iterator[Item]:
        """The row's item; none where it holds nothing of use."""
        key, source = clean(row.key), clean(f"{self._name}#{row.key}{row.ending and '.'}{row.ending}")
        if row.image is not None and not row.wrong:
            try:
                key = name_of(row.columns, self._id) if self._id else key
                yield Item(key, source, (row.image,), row.columns)
            except ValueError as error:
                row.wrong = str(error)
        elif row.columns:
            row.wrong = row.wrong or "has no image that can be read"
        if row.wrong:
            yield Item(key, source, error=BadInput(f"{show(key)} of {show(self._name)} {row.wrong}."))


def _members(file: BufferedReader) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    mode: Literal["r:gz", "r:"] = "r:gz" if file.peek(2)[:2] == b"\x1f\x8b" else "r:"
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_Member) as tar:
        while (member := tar.next()) is not None:
            cast("Any", tar).members.clear()  # tarfile would keep all of them
            if member.size < 0:
                raise tarfile.ReadError("a file of a negative size")
            yield tar, member
        if mode == "r:":  # tarfile takes a broken header for the end; gzip has a checksum
            file.seek(cast("Any", tar).offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("a broken header")
