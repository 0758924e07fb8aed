"""One file over HTTP: resumed where it broke off, and checked against its SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from opsin.core.errors import DownloadFailed

if TYPE_CHECKING:
    from pathlib import Path

# File name, bytes here, bytes in all.
Progress = Callable[[str, int, int], None]

_CHUNK = 1 << 20


def no_progress(name: str, done: int, total: int) -> None:
    """Show nothing."""


class _Broken(Exception):
    """The transfer broke off in a way that may be better the next time."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Where a file comes from and what it must be. `pause` is the wait before the first retry in seconds."""

    client: httpx.Client
    url: str
    name: str
    size: int
    sha256: str | None
    retries: int
    pause: float

    def run(self, target: Path, progress: Progress) -> None:
        """Make `target` that file; do nothing when it is there. What broke off waits in `target`.incomplete.

        Raises DownloadFailed: out of reach, not allowed, cut off too often, or not the file it should be (then the
        file is removed). OSError when the disk refuses.
        """
        if target.exists():
            progress(self.name, self.size, self.size)
            return
        part = target.with_name(target.name + ".incomplete")
        digest = hashlib.sha256()
        done = self._hash_what_is_there(part, digest)
        pause, left, best = self.pause, self.retries, done
        while done < self.size or not part.exists():
            try:
                self._stream(part, digest, progress)
            except (_Broken, httpx.HTTPError) as error:
                now = part.stat().st_size if part.exists() else 0
                if now > best:  # it moved: this is a bad line, not a dead one
                    pause, left, best = self.pause, self.retries, now
                if left == 0:
                    raise DownloadFailed(
                        f"{self.name} broke off at {now / 1e6:,.0f} of {self.size / 1e6:,.0f} MB"
                        f" ({error or type(error).__name__}): run the same command again, it goes on from there"
                    ) from error
                left -= 1
                time.sleep(pause)
                pause *= 2
                digest = hashlib.sha256()
                done = self._hash_what_is_there(part, digest)
            else:
                done = part.stat().st_size
        self._check(part, digest)
        part.replace(target)

    def _hash_what_is_there(self, part: Path, digest: hashlib._Hash) -> int:
        """Feed the bytes of an earlier try to the digest; how many there are. Too many cannot be right: start over."""
        done = 0
        with contextlib.suppress(FileNotFoundError):
            if part.stat().st_size > self.size:
                part.unlink()
            with part.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
        return done

    def _stream(self, part: Path, digest: hashlib._Hash, progress: Progress) -> None:
        start = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self.client.stream("GET", self.url, headers=headers) as answer:
            self._check_status(answer)
            if start and answer.status_code != 206:
                part.unlink()  # the server sends it from the beginning
                raise _Broken("the server cannot resume")
            with part.open("ab") as file:
                done = start
                # Without a size the bytes come as they arrive, so that a break loses none of them.
                for chunk in answer.iter_bytes():
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    progress(self.name, done, self.size)
        if done < self.size:
            raise _Broken("the connection was closed")

    def _check_status(self, answer: httpx.Response) -> None:
        status = answer.status_code
        if status in {200, 206}:
            return
        page = urlsplit(self.url)
        repo = page.path.partition("/resolve/")[0]
        if status in {401, 403}:
            raise DownloadFailed(
                f"{repo.strip('/')} asks for permission: accept its terms at {page.scheme}://{page.netloc}{repo}, then"
                " log in with `hf auth login` or set HF_TOKEN, and pull again"
            )
        if status == 404:
            raise DownloadFailed(f"{self.name} is gone from {repo.strip('/')}: try again, the repository has changed")
        if status == 429 or status >= 500:
            raise _Broken(f"the server answered {status}")
        raise DownloadFailed(f"{self.name} cannot be downloaded: the server answered {status}")

    def _check(self, part: Path, digest: hashlib._Hash) -> None:
        size = part.stat().st_size
        if size != self.size or (self.sha256 and digest.hexdigest() != self.sha256):
            part.unlink()
            raise DownloadFailed(
                f"{self.name} arrived damaged (its checksum is wrong) and was removed: run the same command again"
            )
