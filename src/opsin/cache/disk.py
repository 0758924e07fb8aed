"""Image embeddings on disk, so that an image seen before a restart is not encoded again.

One NumPy archive (.npz) an embedding, named by the SHA-256 of its identity. Whatever is wrong with a file or with the
disk, the worst that happens is that an image is encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path

from opsin.core.files import replacing
from opsin.core.request import Embedding

log = logging.getLogger(__name__)

_MAX_PENDING = 256 * 2**20  # bytes that may wait for the writer; what comes on top is not kept


def default_folder() -> Path:
    """Where embeddings lie when nobody says otherwise: `$XDG_CACHE_HOME/opsin/images`, or the system's like."""
    return user_cache_path("opsin", appauthor=False) / "images"


class DiskStore:
    """A folder of at most `max_bytes`, for its owner alone; several processes may share it, each with its own store.

    A thread writes; a normal end of the process waits for it. The file that was used longest ago goes first; use is
    kept in the file's time.
    """

    def __init__(self, folder: Path, max_bytes: int = 2 * 2**30) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._pending = 0
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="opsin-images")
        self._last: Future[None] | None = None
        self._complained = False

    def get(self, identity: str) -> Embedding | None:
        """The embedding, float32 [n_tokens, n_embd]; None when it is not there or cannot be trusted. Never raises."""
        path = self._path(identity)
        try:
            embedding = _read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._complain(error)
            return None
        except Exception as error:  # noqa: BLE001 - a file can be bad in more ways than can be named
            log.info("a remembered image is dropped: %s", error)
            _remove(path)
            return None
        with contextlib.suppress(OSError):  # it can be read where its time cannot be written
            os.utime(path)
        return embedding

    def put(self, identity: str, embedding: Embedding) -> None:
        """Write it soon, in another thread; the caller must not change it. Never raises, never waits for the disk."""
        size = embedding.nbytes
        with self._lock:
            if size > self._max_bytes or self._pending + size > _MAX_PENDING:
                return
            try:
                self._last = self._writer.submit(self._write, identity, embedding)
            except RuntimeError as error:  # no threads are left, or the interpreter is ending
                self._complain(error)
            else:
                self._pending += size

    def close(self) -> None:
        """Wait until all that was put is written; the store can be used again, and twice does no harm."""
        if self._last is not None:
            self._last.result()

    def _path(self, identity: str) -> Path:
        return self._folder / (hashlib.sha256(identity.encode()).hexdigest() + ".npz")

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            log.warning("images cannot be remembered in %s (%s): they are encoded again", self._folder, error)

    def _write(self, identity: str, embedding: Embedding) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)  # raises in a folder of somebody else
            # Without fsync a power cut may leave less than the whole file: the archive's CRC tells.
            with replacing(self._path(identity)) as part, part.open("wb") as file:
                np.savez(file, embedding=embedding)
            self._make_room()
        except Exception as error:  # noqa: BLE001 - what cannot be kept is no reason to end anything
            self._complain(error)
        finally:
            with self._lock:
                self._pending -= embedding.nbytes

    def _make_room(self) -> None:
        """Remove the files used longest ago, also rests of dead processes, until the others have `max_bytes`."""
        files: list[tuple[int, int, Path]] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):  # another process may have removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                return
            _remove(path)
            total -= size


def _read(path: Path) -> Embedding:
    """Raises OSError when the file cannot be read, and whatever else when it is not to be trusted."""
    file = io.BytesIO(path.read_bytes())
    import zipfile  # here, as most images are new

    with zipfile.ZipFile(file) as archive:
        data = archive.read("embedding.npy")  # all of it: the CRC is compared at the end
    rows: Embedding = np.load(io.BytesIO(data))
    return rows


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
