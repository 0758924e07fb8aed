"""Which pairs are on this machine: downloaded ones, llama.cpp's, those of folders the user names, and the demo."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from opsin.core.errors import ModelError
from opsin.models.caches import CachedRepo, cached_repos, flat_folders
from opsin.models.naming import best_projectors, is_model, take_apart
from opsin.models.pair import Pair
from opsin.models.pairing import check_pair, find_projector
from opsin.models.registry import KNOWN_MODELS
from opsin.models.resolve import demo_pair
from opsin.models.store import read_default

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A pair on this machine. `size` is bytes of both files; `problem` says why it cannot be used, if so."""

    name: str
    pair: Pair
    architecture: str = ""
    projector: str = ""
    quantisation: str = ""
    size: int = 0
    is_default: bool = False
    problem: str | None = None

    def as_dict(self) -> dict[str, str | int | bool | None]:
        """The fields as plain values, paths as text."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            "projector": self.projector,
            "quantisation": self.quantisation,
            "size": self.size,
            "llm_file": str(self.pair.llm),
            "mmproj_file": str(self.pair.mmproj) if self.pair.mmproj else None,
            "is_default": self.is_default,
            "problem": self.problem,
        }


def list_models(folders: Iterable[Path] = ()) -> list[ListedModel]:
    """All pairs found, by name, each once; language models without a projector are left out.

    Names are such that `resolve` understands them. A pair that cannot be used is listed with its problem.
    Raises ModelNotFound when the saved default cannot be read.
    """
    default = read_default()
    found: dict[Path, ListedModel] = {}
    for pair in _pairs(folders, default):
        listed = _describe(pair)
        found.setdefault(pair.llm.resolve(), listed)
    chosen = default.llm.resolve() if default else None
    models = [
        replace(model, is_default=path == chosen if chosen else model.pair.is_demo) for path, model in found.items()
    ]
    return sorted(models, key=lambda model: (model.pair.is_demo, model.name.lower()))


def _pairs(folders: Iterable[Path], default: Pair | None) -> Iterator[Pair]:
    for repo in cached_repos():
        yield from _pairs_of_repo(repo)
    for folder in [*folders, *flat_folders()]:
        yield from _pairs_of_folder(folder)
    if default is not None:
        yield default
    try:
        yield demo_pair()
    except ModelError:  # an installation without the demo still has a list
        return


def _pairs_of_repo(repo: CachedRepo) -> Iterator[Pair]:
    rows = [row for row in KNOWN_MODELS if row.repo.lower() == repo.repo.lower()]
    for file in filter(is_model, repo.files):
        row = next((row for row in rows if row.llm_file in {None, file}), None)
        if row and row.llm_file:
            projectors, name = [row.mmproj_file or ""], row.name
        else:
            parts = take_apart(file)
            tag = f":{parts.tag}" if parts and parts.tag else ""
            projectors, name = best_projectors(repo.files, file), (row.name if row else f"hf:{repo.repo}") + tag
        if projectors and projectors[0] in repo.files:
            yield Pair(repo.folder / file, repo.folder / projectors[0], name)


def _pairs_of_folder(folder: Path) -> Iterator[Pair]:
    for path in sorted(folder.glob("*.gguf")):
        if is_model(path.name) and path.is_file():
            try:
                projector = find_projector(path)
            except ModelError:  # a damaged file, or projectors that belong to its neighbours
                continue
            if projector is not None:
                yield Pair(path, projector, str(path))


def _describe(pair: Pair) -> ListedModel:
    listed = ListedModel(pair.name, pair)
    if pair.mmproj is None:
        return replace(listed, problem="it has no projector, so it reads text only")
    try:
        text, vision = check_pair(pair.llm, pair.mmproj)
    except ModelError as error:
        return replace(listed, problem=str(error))
    return replace(
        listed,
        architecture=text.architecture,
        projector=vision.projector or "",
        quantisation=text.quantisation,
        size=text.size + vision.size,
    )
