"""Image embeddings on disk, so that an image seen before a restart is not encoded again.

One safetensors file an embedding, named by the SHA-256 of its identity. Whatever is wrong with a file or with the
disk, the worst that happens is that an image is encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from opsin.core.files import write_whole
from opsin.core.request import Embedding

log = logging.getLogger(__name__)

MAX_BYTES = 2 * 2**30
_MAX_PENDING = 256 * 2**20  # bytes that may wait for the writer; what comes on top is not kept
_STALE_SECONDS = 3600.0  # the temporary file of a process that died while writing
_SUFFIX = ".safetensors"
_NAME = "embedding"


def default_folder() -> Path:
    """Where embeddings lie when nobody says otherwise: `$XDG_CACHE_HOME/opsin/images`, or the system's like."""
    from platformdirs import user_cache_path

    return user_cache_path("opsin", appauthor=False) / "images"


class DiskStore:
    """A folder of at most `max_bytes`, for its owner alone; several processes may share it, each with its own store.

    A thread writes; a normal end of the process waits for it. The file that was used longest ago goes first; use is
    kept in the file's time.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self._folder = default_folder() if folder is None else folder
        self._max_bytes = max_bytes
        self._pending: dict[str, Embedding] = {}
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="opsin-images")
        self._last: Future[None] | None = None
        self._complained = False

    def get(self, identity: str) -> Embedding | None:
        """The embedding, float32 [n_tokens, n_embd]; None when it is not there or cannot be trusted. Never raises."""
        if (pending := self._pending.get(identity)) is not None:
            return pending
        path = self._path(identity)
        try:
            embedding = _read(path, identity, self._max_bytes)
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
        with self._lock:
            waiting = sum(other.nbytes for other in self._pending.values())
            if embedding.nbytes > self._max_bytes or waiting + embedding.nbytes > _MAX_PENDING:
                return
            try:
                self._last = self._writer.submit(self._write_pending, identity)
            except RuntimeError as error:  # no threads are left, or the interpreter is ending
                self._complain(error)
            else:
                self._pending[identity] = embedding

    def close(self) -> None:
        """Wait until all that was put is written; the store can be used again, and twice does no harm."""
        if self._last is not None:
            self._last.result()

    def _path(self, identity: str) -> Path:
        return self._folder / (hashlib.sha256(identity.encode()).hexdigest() + _SUFFIX)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            log.warning("images cannot be remembered in %s (%s): they are encoded again", self._folder, error)

    def _write_pending(self, identity: str) -> None:
        with self._lock:
            embedding = self._pending.get(identity)
        if embedding is None:
            return  # put twice, and written already
        try:
            self._write(identity, embedding)
        except Exception as error:  # noqa: BLE001 - what cannot be kept is no reason to end anything
            self._complain(error)
        with self._lock:
            del self._pending[identity]

    def _write(self, identity: str, embedding: Embedding) -> None:
        data = _pack(identity, embedding)
        if len(data) > self._max_bytes:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)  # raises in a folder of somebody else
        self._make_room(self._max_bytes - len(data))
        # Without fsync a power cut may leave less than the whole file: see the checksum.
        write_whole(self._path(identity), data)

    def _make_room(self, max_bytes: int) -> None:
        """Remove the files used longest ago until the rest has at most `max_bytes`."""
        files: list[tuple[int, int, Path]] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):  # another process may have removed it
                status = path.stat()
                if path.suffix == _SUFFIX:
                    files.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix == ".tmp" and status.st_mtime < time.time() - _STALE_SECONDS:
                    _remove(path)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= max_bytes:
                return
            _remove(path)
            total -= size


def _pack(identity: str, rows: Embedding) -> bytes:
    from safetensors.numpy import save

    return save({_NAME: np.ascontiguousarray(rows)}, {"identity": identity, "crc32": _checksum(identity, rows)})


def _read(path: Path, identity: str, max_bytes: int) -> Embedding:
    """Raises OSError when the file cannot be read, and whatever else when it is not to be trusted."""
    if path.stat().st_size > max_bytes:  # before the import: most images are new
        raise ValueError("it is larger than all may be together")
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        rows: Embedding = file.get_tensor(_NAME)
    fits = rows.dtype == np.float32 and rows.ndim == 2 and rows.size and np.isfinite(rows).all()
    # This finds chance damage, not an attack: the folder is its owner's.
    if not fits or metadata != {"identity": identity, "crc32": _checksum(identity, rows)}:
        raise ValueError("it is damaged, or belongs to another image")
    return rows


def _checksum(identity: str, rows: Embedding) -> str:
    start = zlib.crc32(f"{identity} {rows.shape}".encode())
    return f"{zlib.crc32(np.ascontiguousarray(rows).data, start):08x}"


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
