"""What is on this machine: downloaded repositories, and which pair is the default.

Downloads lie in the Hugging Face cache, which llama.cpp shares: `models--OWNER--NAME/snapshots/COMMIT/FILE`, as
huggingface_hub and llama.cpp's `common/hf-cache.cpp` write it. The default is one small file in the user's data folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path

from opsin.core.errors import ModelNotFound
from opsin.core.files import expand, write_whole
from opsin.models.pairing import Pair

_PREFIX = "models--"


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A repository that was downloaded, in part or whole: `files` are GGUF paths relative to `folder`, sorted."""

    repo: str
    folder: Path
    files: tuple[str, ...]


def hub_home() -> Path:
    """The folder of everything Hugging Face: HF_HOME, else the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand(os.environ.get("HF_HOME") or f"{cache}/huggingface")


def hub_cache() -> Path:
    """The folder of downloads: HF_HUB_CACHE, else `hub` in `hub_home`."""
    chosen = os.environ.get("HF_HUB_CACHE")
    return expand(chosen) if chosen else hub_home() / "hub"


def cached_repos() -> list[CachedRepo]:
    """Every downloaded repository that has a GGUF file, by name; LLAMA_CACHE first, as llama.cpp does."""
    llama = os.environ.get("LLAMA_CACHE")
    found: dict[str, CachedRepo] = {}
    for root in [*([expand(llama)] if llama else []), hub_cache()]:
        for folder in root.glob(_PREFIX + "*"):
            repo = folder.name.removeprefix(_PREFIX).replace("--", "/", 1)
            snapshot = _snapshot(folder)
            # A link to a download that was removed is no file.
            paths = [path for path in snapshot.rglob("*.gguf") if path.is_file()] if snapshot else []
            if snapshot and paths and repo not in found:
                files = sorted(path.relative_to(snapshot).as_posix() for path in paths)
                found[repo] = CachedRepo(repo, snapshot, tuple(files))
    return [found[repo] for repo in sorted(found)]


def _snapshot(folder: Path) -> Path | None:
    """The commit `main` points at, else the newest."""
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    return max(snapshots, key=lambda path: (path.name == commit, path.stat().st_mtime), default=None)


def state_file() -> Path:
    """`$XDG_DATA_HOME/opsin/models.json`, or its like on macOS and Windows."""
    return user_data_path("opsin", appauthor=False) / "models.json"


def read_default() -> Pair | None:
    """The pair chosen as default; None when none was chosen. Its files need not be there any more.

    Raises ModelNotFound when the state file is damaged.
    """
    path = state_file()
    try:
        default = json.loads(path.read_text(encoding="utf-8"))["default"]
        if default is None:
            return None
        mmproj = default["mmproj"]
        return Pair(Path(default["llm"]), Path(mmproj) if mmproj else None, str(default["name"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelNotFound(
            f"{path} cannot be read or is damaged: delete it, then choose the default again with `opsin models use`"
        ) from error


def write_default(pair: Pair | None) -> None:
    """Make a pair the default; None makes it the demo model again. Raises ModelNotFound when that cannot be saved."""
    path = state_file()
    default = pair and {
        "name": pair.name,
        "llm": str(pair.llm.absolute()),
        "mmproj": str(pair.mmproj.absolute()) if pair.mmproj else None,
    }
    try:
        write_whole(path, json.dumps({"version": 1, "default": default}, indent=2))
    except OSError as error:
        raise ModelNotFound(f"the default model cannot be saved to {path}: {error.strerror or error}") from error
