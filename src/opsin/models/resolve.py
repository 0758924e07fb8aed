"""From what a user gave to the two files that are meant; the list of all pairs on this machine, and the default.

Downloads lie in the Hugging Face cache, which llama.cpp shares: `models--OWNER--NAME/snapshots/COMMIT/FILE`, as
huggingface_hub and llama.cpp's `common/hf-cache.cpp` write it. The default is one small file in the user's data folder.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from platformdirs import user_data_path

from opsin.core.errors import BadParameter, ModelError, ModelNotFound, OpsinError, PairMismatch
from opsin.core.files import expand, write_whole
from opsin.models.gguf import best_model, is_model, read_info, stem, take_apart
from opsin.models.pairing import Pair, check_pair, family_warning, find_projector
from opsin.models.registry import KNOWN_MODELS, Wanted, is_known, look_up

DEMO_NAME = "demo"
_log = logging.getLogger(__name__)


def resolve(model: str | Path | None = None, mmproj: str | Path | None = None) -> Pair:
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
        pair = _meant(str(model), find=mmproj is None)
        if mmproj is not None:
            projector = expand(mmproj)
            if not projector.is_file():
                raise ModelNotFound(f"there is no projector file {projector}: check the path given to --mmproj")
            pair = Pair(pair.llm, projector, pair.name, pair.is_demo and projector == pair.mmproj)
        f"{pair.llm}{pair.mmproj}".encode()
    except UnicodeEncodeError:
        raise ModelNotFound(f"the file name {str(model)!a} is not valid UTF-8: rename the file") from None
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be read, a null byte
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFound(f"the model cannot be looked for ({reason}): check the path given") from error
    if pair.mmproj is not None and not pair.is_demo and (warning := family_warning(*check_pair(pair.llm, pair.mmproj))):
        _log.warning("%s", "".join(sign if sign.isprintable() else "?" for sign in warning))
    return pair


def locate(model: str) -> Path | None:
    """The language model's file behind `--model`; None where there is none."""
    try:
        return _meant(model, find=False).llm
    except (OpsinError, OSError, ValueError):
        return None


def demo_pair() -> Pair:
    """The pair shipped in the package. Raises ModelNotFound when this installation has none."""
    folder = Path(str(resources.files("opsin.models"))) / "demo"
    llm, mmproj = folder / "opsin-demo.gguf", folder / "mmproj-opsin-demo.gguf"
    if not llm.is_file() or not mmproj.is_file():
        raise ModelNotFound(
            "this installation has no demo model: get one with `opsin pull llava-1.5-7b`, or give --model"
        )
    return Pair(llm, mmproj, DEMO_NAME, is_demo=True)


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
    for repo, (folder, files) in cached_repos().items():
        if repo.lower() == wanted.repo.lower() and (pair := _pair_in_repo(folder, files, wanted)):
            return pair
    raise ModelNotFound(f"{wanted.name} is not here yet: get it with `opsin pull {wanted.name}`")


def _pair_in_folder(folder: Path) -> Pair:
    models = sorted(path.name for path in folder.glob("*.gguf") if path.is_file() and is_model(path.name))
    best = best_model(models)
    if best is None:
        raise ModelNotFound(f"{folder} holds no language model: give a folder with a .gguf file, or the file itself")
    if len({stem(name) for name in models}) > 1:
        raise ModelNotFound(f"{folder} holds several models: give one of them, {' or '.join(models[:4])}")
    return Pair(folder / best, find_projector(folder / best), folder.resolve().name)


def _pair_in_repo(folder: Path, files: list[str], wanted: Wanted) -> Pair | None:
    llm, mmproj = wanted.files_of(files)
    return Pair(folder / llm, folder / mmproj if mmproj else None, wanted.name) if llm else None


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
    for repo, (folder, files) in cached_repos().items():
        rows = {row.llm_file: row for row in KNOWN_MODELS if row.repo.lower() == repo.lower()}
        for file in filter(is_model, files):
            tag = "" if file in rows else take_apart(file).tag
            pair = _pair_in_repo(folder, files, Wanted(repo, tag, rows.get(file) or rows.get(None)))
            if pair and pair.mmproj:
                yield pair
    for folder in folders:
        for path in folder.glob("*.gguf"):
            if is_model(path.name) and path.is_file() and (pair := _pair_with_neighbour(path)):
                yield pair
    if default is not None:
        yield default
    with suppress(ModelNotFound):  # an installation without the demo still has a list
        yield demo_pair()


def _pair_with_neighbour(path: Path) -> Pair | None:
    try:
        projector = find_projector(path)
    except PairMismatch:  # projectors that belong to its neighbours
        return None
    except ModelError:  # a damaged file, which is listed as such
        return Pair(path, None, str(path))
    return Pair(path, projector, str(path)) if projector else None


def _describe(pair: Pair, is_default: bool) -> ListedModel:
    about: tuple[str, str, str, int] = ("", "", "", 0)
    problem: str | None = None
    try:
        if pair.mmproj is None:
            read_info(pair.llm)
            problem = "it has no projector, so it reads text only"
        else:
            text, vision = check_pair(pair.llm, pair.mmproj)
            about = (text.architecture, vision.projector or "", text.quantisation, text.size + vision.size)
    except ModelError as error:
        problem = str(error)
    mmproj = None if pair.mmproj is None else str(pair.mmproj)
    return ListedModel(pair.name, *about, str(pair.llm), mmproj, is_default, problem)


def hub_home() -> Path:
    """The folder of everything Hugging Face: HF_HOME, else the user's cache folder."""
    return expand(os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface")


def hub_cache() -> Path:
    """The folder of downloads: HF_HUB_CACHE, else `hub` in `hub_home`."""
    return expand(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub")


def cached_repos() -> dict[str, tuple[Path, list[str]]]:
    """Of every repository downloaded, in part or whole, a folder and the GGUF paths in it; names and paths are sorted.

    LLAMA_CACHE comes first, as llama.cpp has it.
    """
    llama = os.environ.get("LLAMA_CACHE")
    found: dict[str, tuple[Path, list[str]]] = {}
    for root in [*([expand(llama)] if llama else []), hub_cache()]:
        for folder in root.glob("models--*"):
            repo = folder.name.removeprefix("models--").replace("--", "/", 1)
            snapshot = _snapshot(folder)
            # A link to a download that was removed is no file.
            paths = [path for path in snapshot.rglob("*.gguf") if path.is_file()] if snapshot else []
            if snapshot and paths:
                found.setdefault(repo, (snapshot, sorted(path.relative_to(snapshot).as_posix() for path in paths)))
    return dict(sorted(found.items()))


def _snapshot(folder: Path) -> Path | None:
    """The commit `main` points at, else the newest."""
    commit = ""
    with suppress(OSError, UnicodeDecodeError):
        commit = (folder / "refs" / "main").read_text().strip()
    snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    return max(snapshots, key=lambda path: (path.name == commit, path.stat().st_mtime), default=None)


def state_file() -> Path:
    """`$XDG_DATA_HOME/opsin/models.json`, or its like on macOS and Windows."""
    return user_data_path("opsin", appauthor=False) / "models.json"


def read_default() -> Pair | None:
    """The pair chosen as default, which may be gone; None when none was. Raises ModelNotFound for a damaged state."""
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
