"""Downloads pairs from a Hugging Face hub into the cache that huggingface_hub and llama.cpp share.

huggingface_hub is not used: measured with 2.4.0, it throws a partial file away when a download of gigabytes breaks
off, and compares no checksums. Here a broken download goes on where it stopped, also in the next run.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import quote

import httpx
from filelock import FileLock

from opsin.core.errors import DownloadFailed, ModelNotFound
from opsin.core.files import write_whole
from opsin.models.gguf import is_model, part_names, take_apart
from opsin.models.pairing import Pair, check_pair
from opsin.models.registry import Wanted, look_up
from opsin.models.resolve import hub_cache, hub_home, write_default

Progress = Callable[[str, int, int], None]
"""Takes a file's name, its bytes here, and its bytes in all."""

_NO_LISTING = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what another answer raises
_SPARE_BYTES = 256 * 2**20  # left free on the disk


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository at a commit: its size in bytes, and its SHA-256 when the hub knows it."""

    repo: str
    commit: str
    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub and the cache it is mirrored to. `pause` is the wait before the first retry, in seconds; it doubles."""

    endpoint: str
    cache: Path
    token: str | None = field(default=None, repr=False)
    retries: int = 5
    pause: float = 1.0

    @classmethod
    def from_environment(cls) -> Self:
        """As HF_ENDPOINT, HF_HUB_CACHE, HF_HOME and HF_TOKEN say. Raises DownloadFailed under HF_HUB_OFFLINE."""
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise DownloadFailed("HF_HUB_OFFLINE is set, so nothing is downloaded: unset it and try again")
        try:
            saved = (hub_home() / "token").read_text(encoding="utf-8")  # by `hf auth login`
        except (OSError, UnicodeDecodeError):
            saved = ""
        token = os.environ.get("HF_TOKEN", "").strip() or saved.strip() or None
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return cls(endpoint.rstrip("/"), hub_cache(), token)

    def list_files(self, repo: str) -> list[HubFile]:
        """What a repository holds, in the hub's order. Raises ModelNotFound and DownloadFailed."""
        try:
            with self._client() as client:
                answer = client.get(f"{self.endpoint}/api/models/{repo}/revision/main?blobs=true")
            if answer.status_code in {401, 403, 404}:
                raise ModelNotFound(
                    f"{self.endpoint} has no repository {repo}, or it is private: check the name, and for a private"
                    " one log in with `hf auth login` or set HF_TOKEN"
                )
            return _read_listing(repo, answer.raise_for_status().json())
        except (httpx.HTTPError, httpx.InvalidURL, *_NO_LISTING) as error:
            raise DownloadFailed(
                f"{self.endpoint} cannot be reached or did not list {repo} ({error!r}): check HF_ENDPOINT or try later"
            ) from error

    def fetch(self, files: list[HubFile], progress: Progress = lambda *_: None) -> list[Path]:
        """Download what is missing of `files` of one repository; their paths in the cache. Raises DownloadFailed."""
        repo, commit = files[0].repo, files[0].commit
        folder = self.cache / f"models--{repo.replace('/', '--')}"
        snapshot, locks = folder / "snapshots" / commit, self.cache / ".locks" / folder.name
        blobs = [(folder / "blobs" / (file.sha256 or f"{commit}-{quote(file.path, safe='')}"), file) for file in files]
        try:
            for needed in (locks, folder / "blobs"):
                needed.mkdir(parents=True, exist_ok=True)
            missing = sum(file.size - _size(_part(blob)) for blob, file in blobs if not blob.exists())
            free = shutil.disk_usage(self.cache).free
            if missing > 0 and free < missing + _SPARE_BYTES:
                raise DownloadFailed(
                    f"{repo} needs {missing / 1e9:.1f} GB and {self.cache} has {free / 1e9:.1f} GB free: make"
                    " room, or set HF_HUB_CACHE to another disk"
                )
            for blob, file in blobs:
                with FileLock(locks / f"{blob.name}.lock"):
                    if not blob.exists():
                        self._download(file, blob, progress)
                progress(file.path, file.size, file.size)
                link = snapshot / file.path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                try:
                    link.symlink_to(os.path.relpath(blob, link.parent))
                except OSError:  # Windows, without the right to make links
                    os.link(blob, link)
            write_whole(folder / "refs" / "main", commit, mode=0o644)
        except OSError as error:
            raise DownloadFailed(f"{self.cache} cannot be written to: {error.strerror or error}") from error
        return [snapshot / file.path for file in files]

    def _download(self, file: HubFile, blob: Path, progress: Progress) -> None:
        """Make `blob` that file, checked; what broke off waits in a file `.incomplete` beside it."""
        part = _part(blob)
        failures, best = 0, _size(part)
        while _size(part) != file.size or not part.exists():
            try:
                self._append(file, part, progress)
            except httpx.HTTPError as error:
                if _size(part) > best:  # bytes arrived: this is a bad line, not a dead one
                    failures, best = 0, _size(part)
                if failures == self.retries:
                    raise DownloadFailed(
                        f"{file.path} broke off at {_size(part) / 1e6:,.0f} of {file.size / 1e6:,.0f} MB"
                        f" ({error!r}): run the same command again, it goes on from there"
                    ) from error
                time.sleep(self.pause * 2**failures)
                failures += 1
        with part.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != (file.sha256 or digest):
            part.unlink()
            raise DownloadFailed(
                f"{file.path} arrived damaged (its checksum is wrong) and was removed: run the same command again"
            )
        part.replace(blob)

    def _append(self, file: HubFile, part: Path, progress: Progress) -> None:
        """Fetch what `part` lacks. Raises httpx.HTTPError for what is worth another try."""
        if _size(part) > file.size:
            part.unlink()
        done = _size(part)
        url = f"{self.endpoint}/{file.repo}/resolve/{file.commit}/{quote(file.path)}"
        headers = {"Range": f"bytes={done}-"} if done else {}
        with self._client() as client, client.stream("GET", url, headers=headers) as answer:
            if answer.status_code in {401, 403}:
                raise DownloadFailed(
                    f"{file.repo} asks for permission: accept its terms at {self.endpoint}/{file.repo}, then log in"
                    " with `hf auth login` or set HF_TOKEN, and pull again"
                )
            answer.raise_for_status()
            if done and answer.status_code != 206:
                part.unlink()  # the server sends it from the beginning
                raise httpx.RemoteProtocolError("the server cannot resume")
            with part.open("ab") as content:
                # Without a chunk size bytes come as they arrive, so that a break loses none of them.
                for chunk in answer.iter_bytes():
                    content.write(chunk)
                    done += len(chunk)
                    progress(file.path, done, file.size)
        if done != file.size:
            raise httpx.RemoteProtocolError("the connection was closed")

    def _client(self) -> httpx.Client:
        from opsin import __version__

        headers = {"User-Agent": f"opsin/{__version__}", "Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return httpx.Client(headers=headers, follow_redirects=True, timeout=httpx.Timeout(30, connect=10))


def pull(name: str, *, hub: Hub | None = None, progress: Progress = lambda *_: None, make_default: bool = True) -> Pair:
    """Download the pair a name stands for (see `registry.look_up`), check it, and make it the default.

    Raises ModelNotFound (name, repository, no fitting files), DownloadFailed, ModelUnreadable and PairMismatch.
    """
    wanted = look_up(name)
    hub = hub or Hub.from_environment()
    llm, mmproj = choose(hub.list_files(wanted.repo), wanted)
    paths = hub.fetch([mmproj, *llm], progress)  # the small file first: trouble shows early
    pair = Pair(llm=paths[1], mmproj=paths[0], name=wanted.name)
    check_pair(paths[1], paths[0])
    if make_default:
        write_default(pair)
    return pair


def choose(listed: list[HubFile], wanted: Wanted) -> tuple[list[HubFile], HubFile]:
    """All parts of the language model, and the projector. Raises ModelNotFound when the repository lacks either."""
    repo, files = wanted.repo, {file.path: file for file in listed}
    models = [take_apart(path) for path in files if is_model(path)]
    if not models:
        raise ModelNotFound(f"{repo} holds no GGUF language model: look for a repository whose name ends in GGUF")
    model, mmproj = wanted.files_of(list(files))
    if model is None:
        tags = ", ".join(sorted({name.tag for name in models if name.tag}))
        raise ModelNotFound(f"{repo} has no file for {wanted.name}: choose one tagged {tags}")
    if mmproj is None:
        raise ModelNotFound(
            f"{repo} has no projector (mmproj file) for {model}, so it reads text only: pull a vision model"
        )
    missing = [name for name in part_names(model) if name not in files]
    if missing:
        raise ModelNotFound(f"{repo} does not hold {missing[0]}, a part of {model}: pull another model")
    return [files[name] for name in part_names(model)], files[mmproj]


def _read_listing(repo: str, answer: Any) -> list[HubFile]:
    commit = answer["sha"]
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ValueError(commit)
    files = []
    for item in answer["siblings"]:
        path, size = PurePosixPath(item["rfilename"]), item.get("size")
        sha256 = (item.get("lfs") or {}).get("sha256")
        # Names from outside become paths in the cache, and must stay inside.
        inside = not path.is_absolute() and ".." not in path.parts and "\\" not in str(path)
        if inside and isinstance(size, int) and (sha256 is None or re.fullmatch(r"[0-9a-f]{64}", sha256)):
            files.append(HubFile(repo, commit, str(path), size, sha256))
    return files


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _part(blob: Path) -> Path:
    return blob.with_name(blob.name + ".incomplete")
