"""The one folder whose pictures `file:` addresses may name."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from opsin.core.errors import BadParameter, FetchFailed
from opsin.media.limits import check_bytes

if TYPE_CHECKING:
    from opsin.core.settings import MediaSettings


class MediaFolder:
    """Reads files in a folder and below, and nothing else, wherever links lead and whatever is moved meanwhile.

    Links are resolved first; then the file is opened from the folder's descriptor downwards, one name after another,
    and no link is followed any more. Raises BadParameter when the folder is none or the system cannot open so.
    """

    def __init__(self, path: Path) -> None:
        if os.open not in os.supports_dir_fd:
            raise BadParameter("--media-path does not work on this system; send pictures as data: addresses.")
        try:
            self._root = path.resolve(strict=True)
            os.close(self._open_root())
        except (OSError, RuntimeError):
            raise BadParameter(f"--media-path {path} is no folder that can be read; give an existing one.") from None

    def read(self, url: str, limits: MediaSettings) -> bytes:
        """Return the bytes of the file at `file:///…`, up to the limit.

        Raises FetchFailed with the same sentence for whatever lies outside, whether it exists or not; PictureTooLarge.
        """
        try:
            parts = urlsplit(url)
            path = unquote(parts.path, errors="strict")
            odd = parts.netloc.lower() not in {"", "localhost"} or parts.query or parts.fragment
            if odd or not path.startswith("/"):
                raise FetchFailed("A file: address is written file:///folder/picture.png; write it so.")
            below = Path(os.path.realpath(path)).relative_to(self._root)
            descriptor = self._open(below.parts)
        except (OSError, ValueError):
            raise FetchFailed(
                "There is no such picture in the folder that file: addresses may name (--media-path); "
                "check the address, or send the picture as a data: address."
            ) from None
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            os.close(descriptor)
            raise FetchFailed("The file: address names a folder or a device, not a picture; give a file.")
        with os.fdopen(descriptor, "rb") as file:
            check_bytes(info.st_size, "The picture", limits)
            data = file.read(limits.max_bytes + 1)
        check_bytes(len(data), "The picture", limits)
        return data

    def _open_root(self) -> int:
        return os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _open(self, names: tuple[str, ...]) -> int:
        """Open the file that `names` lead to from the folder; the last may be a folder too."""
        here = self._open_root()
        for name in names:
            try:
                # without waiting: a pipe that nobody writes to would hold the thread for ever
                below = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
            finally:
                os.close(here)
            here = below
        return here
