"""From what a user gave to the two files that are meant; and the list of all pairs on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from opsin.core.errors import BadParameter, ModelError, ModelNotFound, OpsinError, PairMismatch
from opsin.core.files import expand
from opsin.models.gguf import read_info
from opsin.models.naming import best_model, best_projectors, is_model, stem, take_apart
from opsin.models.pairing import Pair, check_pair, family_warning, find_projector
from opsin.models.registry import KNOWN_MODELS, Wanted, is_known, look_up
from opsin.models.store import CachedRepo, cached_repos, flat_folders, read_default

DEMO_NAME = "demo"
_log = logging.getLogger(__name__)


def resolve(model: str | None = None, mmproj: str | None = None) -> Pair:
    """The pair meant by `--model` and `--mmproj`.

    `model` is a GGUF file, a folder that holds a pair, a known name, hf:OWNER/NAME[:QUANT], "demo", or None for the
    default, which is the demo model until another was pulled or chosen. The projector is searched beside the model
    when it is not given; without any, the pair reads text only. Both headers are read and must fit.

    Raises ModelNotFound, ModelUnreadable, PairMismatch; BadParameter for `mmproj` without `model`.
    """
    if model is None:
        if mmproj is not None:
            raise BadParameter("--mmproj was given without --model: give the language model it belongs to as well")
        return _default()
    try:
        pair = _meant(model, find=mmproj is None)
        if mmproj is not None:
            projector = expand(mmproj)
            if not projector.is_file():
                raise ModelNotFound(f"there is no projector file {projector}: check the path given to --mmproj")
            pair = Pair(pair.llm, projector, pair.name, pair.is_demo and projector == pair.mmproj)
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be read, a null byte
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFound(f"the model cannot be looked for ({reason}): check the path given") from error
    for path in (pair.llm, pair.mmproj):
        if path is not None and _not_text(path):
            raise ModelNotFound(f"the file name {str(path)!a} is not valid UTF-8: rename the file")
    if pair.mmproj is not None and not pair.is_demo:
        warning = family_warning(*check_pair(pair.llm, pair.mmproj))
        if warning:
            _log.warning("%s", warning)
    return pair


def locate(model: str) -> Path | None:
    """The language model's file behind `--model`; None where there is none."""
    try:
        return _meant(model, find=False).llm
    except (OpsinError, OSError, ValueError):
        return None


def demo_pair() -> Pair:
    """The pair shipped in the package. Raises ModelNotFound when this installation has none."""
    from importlib.resources import files

    folder = Path(str(files("opsin.models"))) / "demo"
    llm, mmproj = folder / "opsin-demo.gguf", folder / "mmproj-opsin-demo.gguf"
    if not llm.is_file() or not mmproj.is_file():
        raise ModelNotFound(
            "this installation has no demo model: get one with `opsin pull llava-1.5-7b`, or give --model"
        )
    return Pair(llm, mmproj, DEMO_NAME, is_demo=True)


def _not_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return True
    return False


def _default() -> Pair:
    pair = read_default()
    if pair is None:
        return demo_pair()
    for path in (pair.llm, pair.mmproj):
        if path is not None and not path.is_file():
            raise ModelNotFound(
                f"the default model {pair.name} is gone from {path}: pull it again, or choose another with"
                " `opsin models use NAME` (demo for the demo model)"
            )
    return pair


def _meant(model: str, *, find: bool) -> Pair:
    if model == DEMO_NAME:
        return demo_pair()
    path = expand(model)
    # A source checkout called llava must not hide the model of that name.
    if path.is_dir() and (any(path.glob("*.gguf")) or not is_known(model)):
        return _pair_in_folder(path)
    if path.is_file():
        return Pair(path, find_projector(path) if find else None, path.stem)
    if path.suffix == ".gguf":
        raise ModelNotFound(f"there is no file {path}: check the path, or see what is here with `opsin models`")
    wanted = look_up(model)
    repo = next((repo for repo in cached_repos() if repo.repo.lower() == wanted.repo.lower()), None)
    pair = _pair_of(repo, wanted) if repo else None
    if pair is None:
        raise ModelNotFound(f"{wanted.name} is not here yet: get it with `opsin pull {wanted.name}`")
    return pair


def _pair_in_folder(folder: Path) -> Pair:
    names = sorted(path.name for path in folder.glob("*.gguf") if path.is_file())
    models = [name for name in names if is_model(name)]
    if not models:
        raise ModelNotFound(f"{folder} holds no language model: give a folder with a .gguf file, or the file itself")
    if len({stem(name) for name in models}) > 1:
        raise ModelNotFound(f"{folder} holds several models: give one of them, {' or '.join(models[:4])}")
    llm = folder / (best_model(models) or models[0])
    return Pair(llm, find_projector(llm), folder.resolve().name)


def _pair_of(repo: CachedRepo, wanted: Wanted) -> Pair | None:
    """What was downloaded of a repository; None when nothing fits."""
    known = wanted.known
    if known and known.llm_file and not wanted.tag:
        llm, mmproj = known.llm_file, known.mmproj_file
        if llm not in repo.files:
            return None
        return Pair(repo.folder / llm, repo.folder / mmproj if mmproj in repo.files else None, wanted.name)
    preferred = known.quantisation if known else ""
    found = best_model(repo.files, wanted.tag or preferred) or (None if wanted.tag else best_model(repo.files))
    if found is None:
        return None
    projectors = best_projectors(repo.files, found)
    return Pair(repo.folder / found, repo.folder / projectors[0] if projectors else None, wanted.name)


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A pair on this machine. `size` is bytes of both files; `problem` says why it cannot be used, if so."""

    name: str
    architecture: str
    projector: str
    quantisation: str
    size: int
    llm_file: str
    mmproj_file: str | None
    is_default: bool = False
    problem: str | None = None


def list_models(folders: Iterable[Path] = ()) -> list[ListedModel]:
    """All pairs found, by name, each once, the demo last; language models without a projector are left out.

    Names are such that `resolve` understands them. A pair that cannot be used is listed with its problem.
    Raises ModelNotFound when the saved default cannot be read.
    """
    default = read_default()
    found: dict[Path, Pair] = {}
    for pair in _all_pairs(folders, default):
        found.setdefault(pair.llm.resolve(), pair)
    chosen = default.llm.resolve() if default else None
    pairs = sorted(found.items(), key=lambda item: (item[1].is_demo, item[1].name.lower()))
    return [_describe(pair, path == chosen if chosen else pair.is_demo) for path, pair in pairs]


def _all_pairs(folders: Iterable[Path], default: Pair | None) -> Iterator[Pair]:
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
            except PairMismatch:  # projectors that belong to its neighbours
                continue
            except ModelError:  # a damaged file, which is listed as such
                yield Pair(path, None, str(path))
                continue
            if projector is not None:
                yield Pair(path, projector, str(path))


def _describe(pair: Pair, is_default: bool) -> ListedModel:
    mmproj = None if pair.mmproj is None else str(pair.mmproj)
    problem = "it has no projector, so it reads text only"
    try:
        if pair.mmproj is not None:
            text, vision = check_pair(pair.llm, pair.mmproj)
            about = (text.architecture, vision.projector or "", text.quantisation, text.size + vision.size)
            return ListedModel(pair.name, *about, str(pair.llm), mmproj, is_default)
        read_info(pair.llm)
    except ModelError as error:
        problem = str(error)
    return ListedModel(pair.name, "", "", "", 0, str(pair.llm), mmproj, is_default, problem)
