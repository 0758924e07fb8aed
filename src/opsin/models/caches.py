"""Where downloaded models lie: the Hugging Face cache, which llama.cpp shares, and llama.cpp's own folders.

Reads folders only. Layout: `models--OWNER--NAME/snapshots/COMMIT/FILE`, as huggingface_hub and llama.cpp's
`common/hf-cache.cpp` write it. huggingface_hub itself is not imported here, because that takes longer than an answer
of the demo model.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "models--"


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A repository that was downloaded, in part or whole: `files` are GGUF paths relative to `folder`, sorted."""

    repo: str
    folder: Path
    files: tuple[str, ...]


def hub_cache() -> Path:
    """The folder huggingface_hub downloads to: HF_HUB_CACHE, else HF_HOME/hub, else the user's cache folder."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def cached_repos() -> list[CachedRepo]:
    """Every downloaded repository that has a GGUF file, by name; LLAMA_CACHE first, as llama.cpp does."""
    roots = [Path(os.environ["LLAMA_CACHE"]).expanduser()] if os.environ.get("LLAMA_CACHE") else []
    found: dict[str, CachedRepo] = {}
    for root in [*roots, hub_cache()]:
        if not root.is_dir():
            continue
        for folder in sorted(root.glob(_PREFIX + "*")):
            repo = folder.name.removeprefix(_PREFIX).replace("--", "/", 1)
            snapshot = _snapshot(folder)
            files = _gguf_files(snapshot) if snapshot else ()
            if snapshot and files and repo not in found:
                found[repo] = CachedRepo(repo, snapshot, files)
    return [found[repo] for repo in sorted(found)]


def flat_folders() -> list[Path]:
    """Folders in which llama.cpp kept plain files before it shared the Hugging Face cache, those that exist."""
    home = "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folders = [os.environ.get("LLAMA_CACHE"), f"{home}/llama.cpp"]
    paths = [Path(folder).expanduser() for folder in folders if folder]
    return [path for path in paths if path.is_dir()]


def _snapshot(folder: Path) -> Path | None:
    """The commit `main` points at, else the newest."""
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except OSError:
        commit = ""
    if commit and (folder / "snapshots" / commit).is_dir():
        return folder / "snapshots" / commit
    others = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    return max(others, key=lambda path: path.stat().st_mtime, default=None)


def _gguf_files(snapshot: Path) -> tuple[str, ...]:
    # A dangling link is a download that was removed: is_file() follows links.
    paths = (path for path in snapshot.rglob("*.gguf") if path.is_file())
    return tuple(sorted(path.relative_to(snapshot).as_posix() for path in paths))
