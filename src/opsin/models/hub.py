"""Downloads pairs from a Hugging Face hub into the cache that huggingface_hub and llama.cpp share.

Which files are fetched is decided as llama.cpp does (`naming`). huggingface_hub is not used: measured with 2.4.0, it
throws a partial file away when a download breaks off or is interrupted (these files are gigabytes), it compares sizes
and no checksums, and a full disk is a warning. Here a broken download goes on where it stopped, also in the next run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import httpx

from opsin.core.errors import DownloadFailed, ModelNotFound
from opsin.core.files import expand, write_whole
from opsin.models.naming import best_model, best_projectors, is_model, split_files, take_apart
from opsin.models.pairing import Pair, check_pair
from opsin.models.registry import Wanted, look_up
from opsin.models.store import hub_cache, hub_home, write_default

# File name, bytes here, bytes in all.
Progress = Callable[[str, int, int], None]

_SPARE_BYTES = 256 * 2**20  # left free on the disk
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class _BrokenOff(Exception):
    """The transfer ended early in a way that may be better the next time."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository: its size in bytes, and its SHA-256 when the hub knows it."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubRepo:
    """The files of a repository at one commit, in the hub's order."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub and the cache it is mirrored to. `pause` is the wait before the first retry, in seconds; it doubles."""

    endpoint: str
    cache: Path
    token: str | None = field(default=None, repr=False)
    retries: int = 5
    pause: float = 1.0

    @classmethod
    def from_environment(cls) -> Hub:
        """As HF_ENDPOINT, HF_HUB_CACHE, HF_HOME and HF_TOKEN say. Raises DownloadFailed under HF_HUB_OFFLINE."""
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise DownloadFailed("HF_HUB_OFFLINE is set, so nothing is downloaded: unset it and try again")
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return cls(endpoint.rstrip("/"), hub_cache(), _token())

    def list_files(self, repo: str) -> HubRepo:
        """What a repository holds. Raises ModelNotFound and DownloadFailed."""
        url = f"{self.endpoint}/api/models/{repo}/revision/main?blobs=true"
        try:
            with self._client() as client:
                answer = client.get(url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DownloadFailed(
                f"{self.endpoint} cannot be reached ({_reason(error)}): check the network or HF_ENDPOINT"
            ) from error
        if answer.status_code in {401, 403, 404}:
            raise ModelNotFound(
                f"{self.endpoint} has no repository {repo}, or it is private: check the name, and for a private one log"
                " in with `hf auth login` or set HF_TOKEN"
            )
        if answer.status_code != 200:
            raise DownloadFailed(f"{self.endpoint} answered {answer.status_code} for {repo}: try again later")
        try:
            return _read_listing(repo, answer.json())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DownloadFailed(f"{self.endpoint} does not speak the hub's language: check HF_ENDPOINT") from error

    def fetch(self, repo: HubRepo, files: list[HubFile], progress: Progress = lambda *_: None) -> list[Path]:
        """Download what is missing of `files`; their paths in the cache. Raises DownloadFailed."""
        from filelock import FileLock

        folder = self.cache / f"models--{repo.repo.replace('/', '--')}"
        snapshot, locks = folder / "snapshots" / repo.commit, self.cache / ".locks" / folder.name
        blobs = {
            file: folder / "blobs" / (file.sha256 or f"{repo.commit}-{quote(file.path, safe='')}") for file in files
        }
        self._check_room(sum(_missing(file, blob) for file, blob in blobs.items()), repo.repo)
        try:
            locks.mkdir(parents=True, exist_ok=True)
            for file, blob in blobs.items():
                blob.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(locks / f"{blob.name}.lock"), self._client() as client:
                    if not blob.exists():
                        self._download(client, repo, file, blob, progress)
                progress(file.path, file.size, file.size)
                _link(blob, snapshot / file.path)
            write_whole(folder / "refs" / "main", repo.commit, mode=0o644)
        except OSError as error:
            raise DownloadFailed(f"{self.cache} cannot be written to: {error.strerror or error}") from error
        return [snapshot / file.path for file in files]

    def _download(self, client: httpx.Client, repo: HubRepo, file: HubFile, blob: Path, progress: Progress) -> None:
        """Make `blob` that file, checked; what broke off waits in a file `.incomplete` beside it."""
        part = _part_of(blob)
        pause, left, best = self.pause, self.retries, _size(part)
        while True:
            try:
                self._append(client, repo, file, part, progress)
                break
            except (_BrokenOff, httpx.HTTPError) as error:
                now = _size(part)
                if now > best:  # bytes arrived: this is a bad line, not a dead one
                    pause, left, best = self.pause, self.retries, now
                if left == 0:
                    raise DownloadFailed(
                        f"{file.path} broke off at {now / 1e6:,.0f} of {file.size / 1e6:,.0f} MB ({_reason(error)}):"
                        " run the same command again, it goes on from there"
                    ) from error
                left -= 1
                time.sleep(pause)
                pause *= 2
        with part.open("rb") as content:
            whole = not file.sha256 or hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
        if not whole or _size(part) != file.size:
            part.unlink()
            raise DownloadFailed(
                f"{file.path} arrived damaged (its checksum is wrong) and was removed: run the same command again"
            )
        part.replace(blob)

    def _append(self, client: httpx.Client, repo: HubRepo, file: HubFile, part: Path, progress: Progress) -> None:
        """Fetch what `part` lacks. Raises _BrokenOff and httpx.HTTPError for what is worth another try."""
        url = f"{self.endpoint}/{repo.repo}/resolve/{repo.commit}/{quote(file.path)}"
        if _size(part) > file.size:
            part.unlink()
        done = _size(part)
        if done == file.size > 0:
            return
        headers = {"Range": f"bytes={done}-"} if done else {}
        with client.stream("GET", url, headers=headers) as answer:
            self._check_status(answer.status_code, repo.repo, file.path)
            if done and answer.status_code != 206:
                part.unlink()  # the server sends it from the beginning
                raise _BrokenOff("the server cannot resume")
            with part.open("ab") as content:
                # Without a chunk size bytes come as they arrive, so that a break loses none of them.
                for chunk in answer.iter_bytes():
                    content.write(chunk)
                    done += len(chunk)
                    progress(file.path, done, file.size)
        if done < file.size:
            raise _BrokenOff("the connection was closed")

    def _check_status(self, status: int, repo: str, name: str) -> None:
        if status in {200, 206}:
            return
        if status in {401, 403}:
            raise DownloadFailed(
                f"{repo} asks for permission: accept its terms at {self.endpoint}/{repo}, then log in with"
                " `hf auth login` or set HF_TOKEN, and pull again"
            )
        if status == 404:
            raise DownloadFailed(f"{name} is gone from {repo}: try again, the repository has changed")
        if status == 429 or status >= 500:
            raise _BrokenOff(f"the server answered {status}")
        raise DownloadFailed(f"{name} cannot be downloaded: the server answered {status}")

    def _client(self) -> httpx.Client:
        from opsin import __version__

        headers = {"User-Agent": f"opsin/{__version__}", "Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return httpx.Client(headers=headers, follow_redirects=True, timeout=httpx.Timeout(30, connect=10))

    def _check_room(self, needed: int, repo: str) -> None:
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.cache).free
        except OSError as error:
            raise DownloadFailed(f"{self.cache} cannot be written to: {error.strerror or error}") from error
        if needed and free < needed + _SPARE_BYTES:
            raise DownloadFailed(
                f"{repo} needs {needed / 1e9:.1f} GB and {self.cache} has {free / 1e9:.1f} GB free: make room, or set"
                " HF_HUB_CACHE to another disk"
            )


def pull(name: str, *, hub: Hub | None = None, progress: Progress = lambda *_: None, make_default: bool = True) -> Pair:
    """Download the pair a name stands for (see `registry.look_up`), check it, and make it the default.

    Raises ModelNotFound (name, repository, no fitting files), DownloadFailed, ModelUnreadable and PairMismatch.
    """
    wanted = look_up(name)
    hub = hub or Hub.from_environment()
    repo = hub.list_files(wanted.repo)
    llm, mmproj = choose(repo, wanted)
    paths = hub.fetch(repo, [mmproj, *llm], progress)  # the small file first: trouble shows early
    pair = Pair(llm=paths[1], mmproj=paths[0], name=wanted.name)
    check_pair(paths[1], paths[0])
    if make_default:
        write_default(pair)
    return pair


def choose(repo: HubRepo, wanted: Wanted) -> tuple[list[HubFile], HubFile]:
    """All parts of the language model, and the projector. Raises ModelNotFound when the repository lacks either."""
    files = {file.path: file for file in repo.files}
    known = wanted.known
    if known and known.llm_file and not wanted.tag:
        if known.llm_file not in files or known.mmproj_file not in files:
            raise ModelNotFound(f"{repo.repo} no longer holds {known.llm_file} with its projector: pull another model")
        return [files[known.llm_file]], files[known.mmproj_file]
    models = [path for path in files if is_model(path)]
    if not models:
        raise ModelNotFound(f"{repo.repo} holds no GGUF language model: look for a repository whose name ends in GGUF")
    model = best_model(files, wanted.tag or (known.quantisation if known else ""))
    if model is None and not wanted.tag:
        model = best_model(files)
    if model is None:
        tags = sorted({name.tag for path in models if (name := take_apart(path)) and name.tag})
        raise ModelNotFound(f"{repo.repo} has no file tagged {wanted.tag}: choose one of {', '.join(tags)}")
    projectors = best_projectors(files, model)
    if not projectors:
        raise ModelNotFound(
            f"{repo.repo} has no projector (mmproj file), so it reads text only: pull a vision model instead"
        )
    parts = [files[path] for path in split_files(files, model)]
    name = take_apart(model)
    if name and len(parts) != name.parts:
        raise ModelNotFound(f"{repo.repo} holds only {len(parts)} of the {name.parts} parts of {model}")
    return parts, files[projectors[0]]


def _read_listing(repo: str, answer: Any) -> HubRepo:
    commit = answer["sha"]
    if not _COMMIT.fullmatch(commit):
        raise ValueError(commit)
    files = []
    for item in answer["siblings"]:
        path = PurePosixPath(item["rfilename"])
        # A name from outside becomes a path in the cache: it must stay inside.
        if path.is_absolute() or ".." in path.parts or "\\" in str(path):
            continue
        sha256 = (item.get("lfs") or {}).get("sha256")
        size = item.get("size")
        if isinstance(size, int) and (sha256 is None or _SHA256.fullmatch(sha256)):
            files.append(HubFile(str(path), size, sha256))
    return HubRepo(repo, commit, tuple(files))


def _token() -> str | None:
    """The user's token: HF_TOKEN, or what `hf auth login` saved."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    path = os.environ.get("HF_TOKEN_PATH")
    try:
        return (expand(path) if path else hub_home() / "token").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _part_of(blob: Path) -> Path:
    return blob.with_name(blob.name + ".incomplete")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _missing(file: HubFile, blob: Path) -> int:
    return 0 if blob.exists() else max(0, file.size - _size(_part_of(blob)))


def _link(blob: Path, path: Path) -> None:
    """Make `path` stand for the blob: a relative link where the system has them, else a copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    up = len(path.parent.relative_to(blob.parent.parent).parts)
    try:
        path.symlink_to(Path(*[".."] * up, "blobs", blob.name))
    except OSError:  # Windows without the right to make links
        shutil.copyfile(blob, path)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
