"""The files of a job's input: on this machine, or wherever fsspec reads; one name, a pattern or a folder."""

import glob
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opsin.core.errors import BadInput, OpsinError
from opsin.images.folder import list_files, natural
from opsin.images.source import show

_ADDRESS = re.compile(r"[A-Za-z][\w+.:-]*://|data:", re.IGNORECASE)
WEB = ("http://", "https://", "data:")
_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_MOST_NAMES = 100_000  # that ranges in braces stand for


def is_address(text: str) -> bool:
    """Whether it begins like an address, so that it is never taken for a path."""
    return _ADDRESS.match(text) is not None


def clean(text: str) -> str:
    """The text, with escapes for what UTF-8 cannot hold, such as odd bytes of a file's name."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever the disk, pyarrow or a file system of fsspec raises becomes a BadInput about the file `name`."""
    try:
        yield
    except OpsinError:
        raise
    except FileNotFoundError:
        raise BadInput(f"There is no file or folder {show(name)}: check the name.") from None
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, NotImplementedError)) and not is_address(name):
            raise  # pyarrow's own errors are kinds of those
        why = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadInput(f"{show(name)} cannot be read ({show(why).rstrip('.')}): check it, and try again.") from None


def open_file(name: str) -> io.BufferedReader:
    """Open a path or an address for reading. Raises what `reading` knows."""
    if not is_address(name):
        return Path(name).open("rb")
    system, path = _remote(name)
    # Not every file of fsspec reads a line of a bounded length by itself.
    return io.BufferedReader(system.open(path, "rb"), 2**20)


def find_files(text: str, skipped: Counter[str], *, recursive: bool) -> tuple[str, list[str]] | None:
    """The files that a folder, a pattern or a range in braces stands for, in natural order, and the folder they are in.

    None: the text is the name of one file. Hidden files are left out. Raises BadInput, and what `reading` knows.
    """
    if not os.path.lexists(text) and (names := _expand(text)) != [text]:
        if missing := next((name for name in names if not is_address(name) and not Path(name).is_file()), None):
            raise BadInput(f"There is no file {show(missing)}: check the range in braces.")
        return _root(text), names
    if is_address(text):
        return None if text.lower().startswith(WEB) else _find_remote(text, recursive=recursive)
    path = Path(text)
    if path.is_dir():
        files, _ = list_files(path, recursive=recursive, on_error=lambda _: skipped.update(["unreadable folder"]))
        return os.fspath(path), files
    if glob.has_magic(text) and not path.exists():
        names = glob.glob(text, recursive=recursive)  # noqa: PTH207 - pathlib lists hidden files, too
        return _root(text), sorted(filter(os.path.isfile, names), key=natural)
    if not path.exists():
        raise FileNotFoundError
    if not path.is_file():
        raise BadInput(f"{show(text)} is a pipe or a device: give a file, or - for a list on standard input.")
    return None


def _find_remote(text: str, *, recursive: bool) -> tuple[str, list[str]] | None:
    system, path = _remote(text)
    if glob.has_magic(path):
        root, found = _root(path), system.glob(path)
    elif system.isdir(path):
        root, found = path.rstrip("/"), system.find(path, maxdepth=None if recursive else 1)
    else:
        return None
    shown = [name for name in found if "/." not in name[len(root) :]]
    address = system.unstrip_protocol
    return address(root), [address(name) for name in sorted(shown, key=natural)]


def _remote(name: str) -> tuple[Any, str]:
    """The file system of an address, and the path there."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise BadInput(f"{show(name)} needs fsspec: pip install 'opsin[batch]'.") from None
    system, path = url_to_fs(name)
    return system, path


def _root(pattern: str) -> str:
    """The folder before the first wildcard or range."""
    return re.split(r"[*?\[{]", pattern, maxsplit=1)[0].rpartition("/")[0]


def _expand(text: str) -> list[str]:
    """The names that ranges in braces stand for; numbers keep their zeros in front."""
    if (found := _RANGE.search(text)) is None:
        return [text]
    numbers, ends = range(int(found[1]), int(found[2]) + 1), _expand(text[found.end() :])
    if not 0 < len(numbers) * len(ends) <= _MOST_NAMES:
        raise BadInput(f"The range in {show(text)} stands for no file, or for more than {_MOST_NAMES:,}: correct it.")
    return [f"{text[: found.start()]}{number:0{len(found[1])}}{end}" for number in numbers for end in ends]
