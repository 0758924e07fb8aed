"""What GGUF file names tell: parts of a split model, quantisation, projectors; and which file llama.cpp would choose.

The rules are those of llama.cpp's `common/download.cpp`, so that both agree on the files of a repository. Paths are
strings with forward slashes, relative to a repository or a folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from opsin.core.errors import ModelNotFound

_SPLIT = re.compile(r"^(?P<prefix>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})$")
_TAG = re.compile(r"[-.]([A-Za-z0-9_]+)$")
_NOT_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

PREFERRED_TAGS = ("Q4_K_M", "Q8_0")


class GgufName(NamedTuple):
    """A file name taken apart: `prefix` is the path without part numbers, `tag` the last word of it in capitals."""

    prefix: str
    tag: str
    part: int
    parts: int


def take_apart(path: str) -> GgufName | None:
    """The pieces of a GGUF file's name; None when it is no GGUF file."""
    if not path.endswith(".gguf"):
        return None
    prefix, part, parts = path.removesuffix(".gguf"), 1, 1
    if split := _SPLIT.match(prefix):
        prefix, part, parts = split["prefix"], int(split["part"]), int(split["parts"])
    tag = _TAG.search(prefix)
    return GgufName(prefix, tag[1].upper() if tag else "", part, parts)


def stem(path: str) -> str:
    """The name without its tag and part numbers, in small letters: what the quantisations of one model share."""
    name = take_apart(path)
    return name.prefix.lower().removesuffix(name.tag.lower()).rstrip("-.") if name else path.lower()


def is_model(path: str) -> bool:
    """Whether a file is a language model by its name, and the first part of it."""
    name = take_apart(path)
    file = path.rpartition("/")[2]
    return name is not None and name.part == 1 and not any(word in file for word in _NOT_MODELS)


def is_projector(path: str) -> bool:
    """Whether a file is a projector by its name."""
    return path.endswith(".gguf") and "mmproj" in path.rpartition("/")[2]


def best_model(paths: Iterable[str], tag: str = "") -> str | None:
    """The language model meant by a quantisation tag; without one Q4_K_M, else Q8_0, else the first."""
    models = [path for path in paths if is_model(path)]
    for wanted in [tag] if tag else PREFERRED_TAGS:
        pattern = re.compile(re.escape(wanted) + "[.-]", re.IGNORECASE)
        if found := next(filter(pattern.search, models), None):
            return found
    return models[0] if models and not tag else None


def best_projectors(paths: Iterable[str], model: str) -> list[str]:
    """Projectors that may belong to a model: the nearest folder (its own or above) first, then the nearest bits."""
    folders = model.split("/")[:-1]
    beside = [path for path in paths if is_projector(path) and path.split("/")[:-1] == folders[: path.count("/")]]
    return sorted(beside, key=lambda path: (-path.count("/"), abs(_bits(path) - _bits(model))))


def _bits(path: str) -> int:
    """4 for Q4_K_M, 16 for F16; 0 when the tag has no number."""
    name = take_apart(path)
    number = re.search(r"\d+", name.tag) if name else None
    return int(number[0]) if number else 0


def part_names(path: str) -> Sequence[str]:
    """The names of all parts of a model, in order; the file alone when it is whole."""
    name = take_apart(path)
    if name is None or name.parts == 1:
        return [path]
    return [f"{name.prefix}-{index:05d}-of-{name.parts:05d}.gguf" for index in range(1, name.parts + 1)]


def parts_of(path: Path) -> Sequence[Path]:
    """All files of a model on disk, in order. Raises ModelNotFound when a part is missing or `path` is a later one."""
    parts = [path.with_name(name) for name in part_names(path.name)]
    if path.name != parts[0].name:
        raise ModelNotFound(f"{path.name} is a later part of a split model: give {parts[0].name}")
    missing = [part.name for part in parts[1:] if not part.exists()]
    if missing:
        raise ModelNotFound(f"{path} is one of {len(parts)} parts and {missing[0]} is missing: download all parts")
    return parts
