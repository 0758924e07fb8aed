"""The folder whose images may be named by `file:` addresses."""

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from opsin.core.errors import BadParameter, FetchFailed
from opsin.core.settings import ImageSettings
from opsin.images.fetch import INSTEAD
from opsin.images.source import check_bytes


class ImageFolder:
    """Reads files in a folder and below, and nothing else, wherever links lead and whatever is moved meanwhile.

    Links are resolved first; then the file is opened from the folder's descriptor downwards, name by name, and links
    are no longer followed. Raises BadParameter if the path is not a folder that can be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._root = path.resolve(strict=True)
            os.close(self._open(Path()))
        except (OSError, RuntimeError):
            raise BadParameter(f"--media-path {path} is not a readable folder: give an existing one.") from None

    def read(self, url: str, limits: ImageSettings) -> bytes:
        """Return the bytes of the file at `file:///…`, up to the limit.

        Raises FetchFailed with the same sentence for everything outside, whether it exists or not; ImageTooLarge.
        """
        try:
            parts = urlsplit(url)
            path = unquote(parts.path, errors="strict")
            if parts.netloc.lower() not in {"", "localhost"} or parts.query or parts.fragment or path[:1] != "/":
                raise FetchFailed("A file: address has the form file:///folder/image.png: write it like this.")
            descriptor = self._open(Path(os.path.realpath(path)).relative_to(self._root))
        except (OSError, ValueError):
            raise FetchFailed(
                "There is no such image in the folder that file: addresses may name (--media-path): "
                f"check the address, {INSTEAD}"
            ) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FetchFailed("The file: address names a folder or a device, not an image: give a file.")
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limits.max_bytes + 1)
        check_bytes(len(data), "The image", limits)
        return data

    def _open(self, below: Path) -> int:
        """Open what `below` leads to from the folder: a file, or a folder too."""
        here = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # A link is not followed, and a pipe that nobody writes to is not waited for.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        for name in below.parts:
            try:
                inner = os.open(name, flags, dir_fd=here)
            finally:
                os.close(here)
            here = inner
        return here
