"""Any input of a job: a folder, a pattern, one image, a list, a table or a tar, here or where fsspec reads."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

from opsin.core.errors import BadImage, BadInput, BadParameter
from opsin.core.files import expand
from opsin.images import ENDINGS
from opsin.images.folder import is_image
from opsin.images.sniff import image_format
from opsin.images.source import show
from opsin.jobs.files import WEB, clean, find_files, is_address, open_file, reading
from opsin.jobs.item import Item, Source
from opsin.jobs.tables import MAX_ROW, csv_rows, json_rows, open_table, parquet_rows
from opsin.jobs.tars import open_tars

_Opener = Callable[[Sequence[str], str | None, str | None], Source]
_OPENERS: dict[tuple[str, ...], _Opener] = {
    (".parquet",): partial(open_table, parquet_rows),
    (".tar", ".tar.gz", ".tgz"): open_tars,
    (".jsonl", ".ndjson"): partial(open_table, json_rows),
    (".csv", ".tsv"): partial(open_table, csv_rows),
}
_KINDS = (
    "a folder, a pattern in quotes, an image, a .jsonl, .csv, .tsv, .parquet or .tar file, or - for a list of images"
)
_BLOCK = 2**16
_LOOKED_AT = 100  # rows
_ONE_PAGE = tuple(ending for ending in ENDINGS if ending not in {".pdf", ".tif", ".tiff"})


def open_source(
    text: str, *, image_column: str | None = None, id_column: str | None = None, recursive: bool = True
) -> Source:
    """The rows of an input. `image_column` and `id_column` are those of a table; `recursive`: folders in folders, too.

    Raises BadInput for an input that cannot be read or holds no rows, BadParameter for a column where there are none.
    """
    with reading(text):
        if text != "-":
            source = _open(text, image_column, id_column, recursive=recursive)
        elif sys.stdin.isatty():
            raise BadInput("The list of images is missing: find photos -name '*.jpg' | opsin batch - …")
        else:
            source = Source(lambda: _items("", _read_list()), once=True)
    if source.columns is None and (image_column or id_column):
        raise BadParameter(f"{show(text)} is no table, so it has no columns: leave out --image-column and --id.")
    return source


def all_differ(rows: Source) -> bool:
    """Whether each row is about an image of its own, by its name no document; of a table or tar the first rows tell."""
    seen: set[int] = set()
    with suppress(BadInput):  # the job itself tells of it, behind the rows that can be read
        for item in () if rows.once else islice(rows, _LOOKED_AT if rows.folder is None else None):
            one = len(item.images) == 1 and item.source.lower().endswith(_ONE_PAGE) and hash(item.images) not in seen
            if not (one or item.error):
                return False
            seen.add(hash(item.images))
    return not (rows.is_requests or rows.once)


def _open(text: str, image_column: str | None, id_column: str | None, *, recursive: bool) -> Source:
    if text[:7].lower() == "file://":
        text = unquote(urlsplit(text).path)
    if text.startswith("~") and not os.path.lexists(text):
        text = os.fspath(expand(text))
    if not text.strip():
        raise BadInput(f"The input is empty: give {_KINDS}.")
    skipped: Counter[str] = Counter()
    found = find_files(text, skipped, recursive=recursive)
    if found is None:
        if (opener := _opener(text)) is not None:
            return opener([text], image_column, id_column)
        _check_image(text)
        return _image_files(os.fspath(Path(text).parent), [text], skipped)
    root, names = found
    if images := [name for name in names if name.lower().endswith(ENDINGS) and (is_address(name) or is_image(name))]:
        skipped.update(map(_ending, set(names).difference(images)))
        return _image_files(root, images, skipped)
    for opener in _OPENERS.values():
        if parts := [name for name in names if _opener(name) is opener]:
            return opener(parts, image_column, id_column)
    raise BadInput(f"There is no image in {show(text)}: no file there is named like one that can be read.")


def _opener(name: str) -> _Opener | None:
    """What reads the rows of a file of that name; None where the file is one image, or nothing that is known."""
    path = urlsplit(name).path if is_address(name) else name
    if name[:5].lower() == "data:":
        return None
    return next((opener for endings, opener in _OPENERS.items() if path.lower().endswith(endings)), None)


def _image_files(root: str, names: Sequence[str], skipped: Counter[str]) -> Source:
    """Images, whose ids are their names below `root`."""
    folder = None if is_address(names[0]) else Path(root)
    prefix = root and f"{root}/"
    return Source(partial(_items, prefix, names), len(names), folder=folder, skipped=skipped)


def _items(root: str, names: Iterable[str]) -> Iterator[Item]:
    for number, name in enumerate(names, 1):
        if name[:5].lower() == "data:":  # too long for a name
            yield Item(str(number), f"-#{number}", (name,))
        else:
            yield Item(clean(name.removeprefix(root).lstrip("/") if root else name), clean(name), (name,))


def _ending(name: str) -> str:
    ending = Path(name).suffix.lower()
    return "no file" if ending in ENDINGS else ending or "without an ending"


def _check_image(text: str) -> None:
    """Raise BadInput unless a file is named like an image or begins like one."""
    if text.lower().startswith(WEB) or text.lower().endswith(ENDINGS):
        return
    with open_file(text) as file:
        try:
            image_format(file.read(4096), show(text))
        except BadImage:
            raise BadInput(f"{show(text)} is no kind of input that is known: give {_KINDS}.") from None


def _read_list() -> Iterator[str]:
    """Lines of standard input, or what stands between NULs where there are any; empty ones are left out."""
    left, separator = b"", b""
    with reading("standard input"):
        while block := cast("BufferedReader", sys.stdin.buffer).read1(_BLOCK):
            left += block
            separator = separator or (b"\0" if b"\0" in left else b"\n" if b"\n" in left else b"")
            if separator:
                *names, left = left.split(separator)
                ends = b"\r" if separator == b"\n" else b""
                yield from map(os.fsdecode, filter(None, (name.rstrip(ends) for name in names)))
            if len(left) > MAX_ROW:
                raise BadInput(f"A line on standard input is longer than {MAX_ROW:,} bytes: give one image a line.")
        if left:
            yield os.fsdecode(left)
