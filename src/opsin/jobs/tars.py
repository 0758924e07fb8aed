"""Rows of WebDataset tars: files that share a name up to its first dot are one row. Nothing in a tar is unpacked."""

import gzip
import tarfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from io import BufferedReader
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

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
Files = Iterator[tuple[str, str, tarfile.TarInfo]]
"""The key of a file, its ending and its header."""


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


class _Bounded:
    """A file that refuses what headers ask for beyond reason."""

    def __init__(self, file: BufferedReader | gzip.GzipFile) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MOST_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


class _Shard:
    """One tar. See `open_tars`."""

    def __init__(self, name: str, image: str | None, row_id: str | None, skipped: Counter[str]) -> None:
        self._name, self._id, self._skipped = name, row_id, skipped
        self._image = image and image.lower().lstrip(".")
        self._tar: Any = None
        self._in_place = not is_address(name)  # images are read later, from where they are

    def items(self) -> Iterator[Item]:
        """The rows; where the tar is damaged, an error row is the last."""
        key = ""
        try:
            with open_file(self._name) as file:
                packed = file.peek(2)[:2] == b"\x1f\x8b"
                self._in_place = self._in_place and not packed
                bounded = _Bounded(gzip.GzipFile(fileobj=file) if packed else file)
                for key, files in groupby(self._files(bounded), itemgetter(0)):
                    yield from self._row(key, files)
        except _BROKEN as error:
            name, key, why = show(self._name), clean(key or self._name), show(str(error).rstrip("."))
            wrong = BadInput(f"{name} cannot be read as a tar at {show(key)} ({why}): copy it again.")
            yield Item(key, clean(f"{self._name}#{key}"), error=wrong)

    def _files(self, file: Any) -> Files:
        with tarfile.open(fileobj=file, mode="r:") as self._tar:
            while (member := self._tar.next()) is not None:
                self._tar.members.clear()  # tarfile would keep all of them
                if member.size < 0:
                    raise tarfile.ReadError("a file of a negative size")
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, _, ending = base.partition(".")
                if member.isreg() and not member.issparse() and stem:  # no folder, link or hidden file
                    yield folder + slash + stem, ending.lower(), member
            file.seek(self._tar.offset)  # tarfile takes a broken header for the end
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("a broken header")

    def _row(self, key: str, files: Files) -> Iterator[Item]:
        """The row's item; none where it holds nothing of use."""
        image: ImageRef | None = None
        columns: dict[str, Any] = {}
        chosen = wrong = ""
        for _, ending, member in files:
            last = f".{ending.rpartition('.')[2]}"
            is_image = last in ENDINGS if self._image is None else ending == self._image
            try:
                # 1.jpg is the image also where 1.depth.png is before it.
                if is_image and (image is None or ("." in chosen and "." not in ending)):
                    part = FilePart(self._name, member.offset_data, member.size)
                    image, chosen = part if self._in_place else self._read(member), ending
                elif ending == "txt":
                    columns["caption"] = self._read(member).decode("utf-8", "replace").strip()
                elif ending == "json":
                    columns = {**(json_object(self._read(member).decode()) or {}), **columns}
                else:
                    self._skipped[last if ending else "without an ending"] += 1
            except ValueError as error:
                wrong = f"holds {show(member.name)}, which cannot be read ({error}): correct it"
        source = clean(f"{self._name}#{key}{chosen and '.'}{chosen}")
        row_id, wrong = clean(key), wrong or ("has no image that can be read" if image is None and columns else "")
        if self._id and image is not None and not wrong:
            try:
                row_id = name_of(columns, self._id)
            except ValueError as error:
                wrong = str(error)
        if wrong:
            yield Item(row_id, source, error=BadInput(f"{show(key)} of {show(self._name)} {wrong}."))
        elif image is not None:
            yield Item(row_id, source, (image,), columns)

    def _read(self, member: tarfile.TarInfo) -> bytes:
        if member.size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        data: bytes = self._tar.extractfile(member).read()
        return data
