"""The files of a folder, in the order in which people count."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from opsin.images.sniff import ENDINGS


def list_files(folder: Path, *, recursive: bool, on_error: Callable[[OSError], None]) -> tuple[list[str], list[str]]:
    """Paths of a folder's files in natural order, and of the folders that were not read because not `recursive`.

    Hidden files and folders are left out, and links to folders are not followed.
    """
    files, folders = list[str](), list[str]()
    for here, below, names in os.walk(folder, onerror=on_error):
        below[:] = [name for name in below if not name.startswith(".")]
        files += [os.fspath(Path(here, name)) for name in names if not name.startswith(".")]  # the Mac's ._ files, too
        if not recursive:
            folders, below[:] = below[:], []
    return sorted(sorted(files), key=natural), sorted(folders, key=natural)


def is_image(path: str) -> bool:
    """Whether it is named like an image, and a file."""
    return path.lower().endswith(ENDINGS) and Path(path).is_file()


def natural(path: str) -> str:
    """A key that sorts names as people do: p2 before p10, letters whatever their case, a folder before its neighbours.

    One string, because a million of them fit in memory: a number is its length and its digits, after a NUL that sorts
    before all that a name may hold.
    """
    return re.sub(r"\d+", _sortable, path.casefold().replace("/", "\0\0"))


def _sortable(number: re.Match[str]) -> str:
    digits = str(int(number[0]))
    return f"\0{chr(len(digits))}{digits}"
