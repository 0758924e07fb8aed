"""One file of a repository by a pattern, through the downloads of the models room."""

from __future__ import annotations

import os
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from opsin.core.errors import BadParameter, ModelNotFound


def download(repo_id: str, filename: str | None, options: dict[str, Any]) -> Path:
    """Fetch the one file that fits `filename` (a name or a pattern); its path.

    Of `options`, those of llama-cpp-python's downloads (`additional_files`, `cache_dir`, `local_dir`) are taken out.
    Raises ModelNotFound when no file fits or several do, DownloadFailed, BadParameter.
    """
    from opsin.models.hub import Hub

    additional = options.pop("additional_files", None) or ()
    cache: str | os.PathLike[str] | None = options.pop("cache_dir", None)
    links = options.pop("local_dir_use_symlinks", "auto")
    if options.pop("local_dir", None) is not None or links != "auto":
        raise BadParameter(
            "local_dir is not supported: downloads go to the Hugging Face cache, which cache_dir or HF_HUB_CACHE moves."
        )
    if not filename:
        raise BadParameter('filename is missing: give a name or a pattern, such as "*Q4_K_M.gguf".')
    hub = Hub.from_environment()
    if cache is not None:
        hub = replace(hub, cache=Path(cache))
    repo = hub.list_files(repo_id)
    files = {file.path: file for file in repo.files}
    wanted = [files[_only(list(files), pattern, repo_id)] for pattern in (filename, *additional)]
    return hub.fetch(repo, wanted)[0]


def _only(files: list[str], pattern: str, repo_id: str) -> str:
    fitting = [path for path in files if fnmatch(path, pattern)]
    if len(fitting) != 1:
        found = "No file" if not fitting else f"{len(fitting)} files"
        there = ", ".join(sorted(fitting or files)[:12])
        raise ModelNotFound(f"{found} of {repo_id} fit {pattern!r}: name one of {there}.")
    return fitting[0]
