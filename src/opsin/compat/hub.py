"""One file of a repository by a pattern, through the downloads of the models room."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from opsin.core.errors import BadParameter, ModelNotFound


def download(
    repo_id: str,
    filename: str | None,
    *,
    local_dir: str | os.PathLike[str] | None = None,
    local_dir_use_symlinks: bool | str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    additional_files: Sequence[str] = (),
) -> Path:
    """Fetch the one file that fits `filename` (a name or a pattern) and the additional ones; the first one's path.

    Raises ModelNotFound when none fits or several do, DownloadFailed, BadParameter.
    """
    from opsin.models.hub import Hub

    if local_dir is not None or local_dir_use_symlinks != "auto":
        raise BadParameter(
            "local_dir is not supported: downloads go to the Hugging Face cache, which cache_dir or HF_HUB_CACHE moves."
        )
    if not filename:
        raise BadParameter('filename is missing: give a name or a pattern, such as "*Q4_K_M.gguf".')
    hub = Hub.from_environment()
    if cache_dir is not None:
        hub = replace(hub, cache=Path(cache_dir))
    repo = hub.list_files(repo_id)
    files = {file.path: file for file in repo.files}
    wanted = [files[_only(list(files), pattern, repo_id)] for pattern in (filename, *additional_files)]
    return hub.fetch(repo, wanted)[0]


def _only(files: list[str], pattern: str, repo_id: str) -> str:
    fitting = [path for path in files if fnmatch(path, pattern)]
    if len(fitting) != 1:
        found = "No file" if not fitting else f"{len(fitting)} files"
        there = ", ".join(sorted(fitting or files)[:12])
        raise ModelNotFound(f"{found} of {repo_id} fit {pattern!r}: name one of {there}.")
    return fitting[0]
