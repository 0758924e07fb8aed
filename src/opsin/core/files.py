"""Write a file whole or not at all, and read one that may be anything."""

import os
import stat
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opsin.core.errors import BadParameter


@contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[Path]:
    """A new empty file beside `path`, which replaces it at the end of the block; after an error nothing has changed.

    Missing folders are made, readable by the user alone. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(".tmp", f".{path.name[:64]}-", path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(mode)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes | str, mode: int = 0o600) -> None:
    """Write a file in one step; text as UTF-8. Raises OSError."""
    with replacing(path, mode) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def read_text(path: Path, limit: int) -> str:
    """The UTF-8 text, byte order mark or not, of a regular file of at most `limit` bytes. Raises BadParameter."""
    try:
        status = path.stat()  # before the file is opened: opening a pipe that nobody writes to never ends
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise BadParameter(f"{path} is {kind}: give a text file.")
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise BadParameter(f"{path} is larger than {limit:,} bytes: give a smaller file.")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise BadParameter(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise BadParameter(f"{path} is not text in UTF-8 (at byte {error.start}): save it as UTF-8.") from None


def expand(path: str | Path) -> Path:
    """The path with `~` replaced by the home folder. Raises BadParameter for a user that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise BadParameter(f"{path} names a home folder that does not exist: give the whole path.") from None


def read_table(module: str, name: str) -> dict[str, Any]:
    """A TOML file of the package, which lies beside the module with that `__file__`."""
    return tomllib.loads(Path(module).with_name(name).read_text(encoding="utf-8"))
