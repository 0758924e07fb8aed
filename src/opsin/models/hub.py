"""Downloads pairs from a Hugging Face hub into the cache that huggingface_hub and llama.cpp share.

Which files are fetched is decided as llama.cpp does (`naming`). huggingface_hub gives the endpoint, the token, the
cache and its lock; the transfer is our own, because since 1.0 it starts a broken download from the beginning, and
these files are gigabytes.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import httpx

from opsin.core.errors import DownloadFailed, ModelNotFound
from opsin.models.naming import best_model, best_projectors, is_model, split_files, take_apart
from opsin.models.pair import Pair
from opsin.models.pairing import check_pair
from opsin.models.registry import Wanted, look_up
from opsin.models.store import write_default
from opsin.models.transfer import Progress, Transfer, no_progress

_SPARE_BYTES = 256 * 2**20  # left free on the disk
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise DownloadFailed("HF_HUB_OFFLINE is set, so nothing is downloaded: unset it and try again")
        return cls(constants.ENDPOINT, Path(constants.HF_HUB_CACHE), get_token())

    def list_files(self, repo: str) -> HubRepo:
        """What a repository holds. Raises ModelNotFound and DownloadFailed."""
        url = f"{self.endpoint}/api/models/{repo}/revision/main?blobs=true"
        try:
            with self._client() as client:
                answer = client.get(url)
        except httpx.HTTPError as error:
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DownloadFailed(f"{self.endpoint} does not speak the hub's language: check HF_ENDPOINT") from error

    def fetch(self, repo: HubRepo, files: list[HubFile], progress: Progress = no_progress) -> list[Path]:
        """Download what is missing of `files`; their paths in the cache. Raises DownloadFailed."""
        from huggingface_hub.file_download import repo_folder_name
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # imported there, not in its __all__

        folder = self.cache / repo_folder_name(repo_id=repo.repo, repo_type="model")
        snapshot = folder / "snapshots" / repo.commit
        blobs = {
            file: folder / "blobs" / (file.sha256 or f"{repo.commit}-{quote(file.path, safe='')}") for file in files
        }
        self._check_room(sum(_missing(file, blob) for file, blob in blobs.items()), repo.repo)
        try:
            for file, blob in blobs.items():
                blob.parent.mkdir(parents=True, exist_ok=True)
                with WeakFileLock(self._lock(folder, blob)), self._client() as client:
                    url = f"{self.endpoint}/{repo.repo}/resolve/{repo.commit}/{quote(file.path)}"
                    Transfer(client, url, file.path, file.size, file.sha256, self.retries, self.pause).run(
                        blob, progress
                    )
                _link(blob, snapshot / file.path)
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / "main").write_text(repo.commit)
        except OSError as error:
            raise DownloadFailed(f"{self.cache} cannot be written to: {error.strerror or error}") from error
        return [snapshot / file.path for file in files]

    def _client(self) -> httpx.Client:
        from opsin import __version__

        headers = {"User-Agent": f"opsin/{__version__}", "Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return httpx.Client(headers=headers, follow_redirects=True, timeout=httpx.Timeout(30, connect=10))

    def _lock(self, folder: Path, blob: Path) -> Path:
        lock = self.cache / ".locks" / folder.name / f"{blob.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock

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


def pull(name: str, *, hub: Hub | None = None, progress: Progress = no_progress, make_default: bool = True) -> Pair:
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
        raise ModelNotFound(f"{repo.repo} has no file tagged {wanted.tag}: choose one of {', '.join(_tags(models))}")
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


def _tags(models: list[str]) -> list[str]:
    return sorted({name.tag for model in models if (name := take_apart(model)) and name.tag})


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


def _missing(file: HubFile, blob: Path) -> int:
    if blob.exists():
        return 0
    part = blob.with_name(blob.name + ".incomplete")
    return file.size - (part.stat().st_size if part.exists() else 0)


def _link(blob: Path, path: Path) -> None:
    """Make `path` stand for the blob: a relative link where the system has them, else a second name or a copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    up = len(path.parent.relative_to(blob.parent.parent).parts)
    try:
        path.symlink_to(Path(*[".."] * up, "blobs", blob.name))
    except OSError:  # Windows without the right to make links
        shutil.copyfile(blob, path)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
