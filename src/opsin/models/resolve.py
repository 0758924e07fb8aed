"""From what a user gave to the two files that are meant."""

from __future__ import annotations

from pathlib import Path

from opsin.core.errors import BadParameter, ModelNotFound, OpsinError
from opsin.models.caches import CachedRepo, cached_repos
from opsin.models.naming import best_model, best_projectors, is_model, stem
from opsin.models.pair import Pair
from opsin.models.pairing import check_pair, find_projector
from opsin.models.registry import Wanted, is_known, look_up
from opsin.models.store import read_default

DEMO_NAME = "demo"


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
    pair = _meant(model, find=mmproj is None)
    if mmproj is not None:
        projector = Path(mmproj).expanduser()
        if not projector.is_file():
            raise ModelNotFound(f"there is no projector file {projector}: check the path given to --mmproj")
        pair = Pair(pair.llm, projector, pair.name, pair.is_demo and projector == pair.mmproj)
    if pair.mmproj is not None and not pair.is_demo:
        check_pair(pair.llm, pair.mmproj)
    return pair


def locate(model: str) -> Path | None:
    """The language model's file behind `--model`; None where there is none."""
    try:
        return _meant(model, find=False).llm
    except OpsinError:
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


def pair_in_cache(wanted: Wanted) -> Pair | None:
    """What was downloaded of a repository; None when nothing fits. Raises PairMismatch when its files do not fit."""
    repo = next((repo for repo in cached_repos() if repo.repo.lower() == wanted.repo.lower()), None)
    return _pair_of(repo, wanted) if repo else None


def pair_in_folder(folder: Path) -> Pair:
    """The pair a folder holds. Raises ModelNotFound when there is none, or more than one model."""
    names = sorted(path.name for path in folder.glob("*.gguf") if path.is_file())
    models = [name for name in names if is_model(name)]
    if not models:
        raise ModelNotFound(f"{folder} holds no language model: give a folder with a .gguf file, or the file itself")
    if len({stem(name) for name in models}) > 1:
        raise ModelNotFound(f"{folder} holds several models: give one of them, {' or '.join(models[:4])}")
    llm = folder / (best_model(models) or models[0])
    return Pair(llm, find_projector(llm), folder.resolve().name)


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
    path = Path(model).expanduser()
    # A source checkout called llava must not hide the model of that name.
    if path.is_dir() and (any(path.glob("*.gguf")) or not is_known(model)):
        return pair_in_folder(path)
    if path.is_file():
        return Pair(path, find_projector(path) if find else None, path.stem)
    if path.suffix == ".gguf":
        raise ModelNotFound(f"there is no file {path}: check the path, or see what is here with `opsin models`")
    wanted = look_up(model)
    pair = pair_in_cache(wanted)
    if pair is None:
        raise ModelNotFound(f"{wanted.name} is not here yet: get it with `opsin pull {wanted.name}`")
    return pair


def _pair_of(repo: CachedRepo, wanted: Wanted) -> Pair | None:
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
