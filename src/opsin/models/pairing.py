"""A language model and its projector: which file belongs to which, judged by what the files say of themselves."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from opsin.core.errors import ModelError, PairMismatch
from opsin.core.files import read_table
from opsin.models.gguf import GgufInfo, best_projectors, is_projector, read_info, stem

_FAMILIES = read_table(__file__, "families.toml")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two GGUF files that belong together.

    `mmproj` is None when no projector was found: the model then reads text only. `name` is what a user would type, or
    the file's stem. Of a split language model `llm` is the first part, as llama.cpp wants it.
    """

    llm: Path
    mmproj: Path | None
    name: str
    is_demo: bool = False


def check_pair(llm: Path | GgufInfo, mmproj: Path | GgufInfo) -> tuple[GgufInfo, GgufInfo]:
    """Make sure that two files belong together, and give back what they say; paths are read.

    Raises what `read_info` does, and PairMismatch, which names a file beside the model that would fit.
    """
    text, vision = (read_info(one) if isinstance(one, Path) else one for one in (llm, mmproj))
    llm, mmproj = text.path, vision.path
    if text.is_projector:
        swapped = f", and {mmproj.name} is one: swap --model and --mmproj"
        advice = ": give the language model as --model" if vision.is_projector else swapped
        raise PairMismatch(f"{llm.name} is a projector, not a language model{advice}")
    if not vision.is_projector:
        wrong = "is a language model, not a projector"
    elif not vision.has_vision:
        wrong = "has no vision encoder, it cannot see images"
    elif not _fits(text, vision):
        widths = f"hands over {vision.projector_width} values a token and {llm.name} takes in {text.width}"
        wrong = f"{widths}: they do not belong together"
    else:
        return text, vision
    names = (path for path in sorted(llm.parent.iterdir()) if is_projector(path.name) and not mmproj.samefile(path))
    fitting = [path.name for path in names if _could_fit(text, path) and not read_info(path).is_all_f32]
    better = (
        f"{' or '.join(fitting[:3])} beside the model would fit"
        if fitting
        else "take the projector (mmproj-….gguf) from the place the model came from"
    )
    raise PairMismatch(f"{mmproj.name} {wrong}; {better}")


def family_warning(text: GgufInfo, vision: GgufInfo) -> str | None:
    """A sentence where widths fit by chance and the families differ, so that answers would be nonsense; else None."""
    kind = vision.projector or ""
    theirs = _named(vision), _families("kinds", kind) or {"LLaVA"}  # many unknown kinds are like its own
    ours = _named(text), _families("architectures", text.architecture)
    if all(one & other for one in theirs for other in ours if one and other):
        return None
    first, second = (f" ({' or '.join(sorted(named))})" if named else "" for named in (theirs[0], ours[0]))
    return (
        f"{vision.path.name} is a projector of the kind {kind[:64] or 'unknown'}{first}, and {text.path.name} is a"
        f" {text.architecture[:64]} model{second}: they are of different families, so answers may be nonsense"
    )


def _named(info: GgufInfo) -> set[str]:
    return {name for name, row in _FAMILIES.items() if re.search(row["word"], info.names)}


def _families(key: str, value: str) -> set[str]:
    return {name for name, row in _FAMILIES.items() if value in row[key]}


def find_projector(llm: Path) -> Path | None:
    """The projector in a language model's folder: one whose width fits, then the likest name, then llama.cpp's rule.

    None when the folder has none. Raises PairMismatch when it has some and none fits, and `read_info`'s errors for
    the language model itself.
    """
    names = sorted(path.name for path in llm.parent.iterdir() if is_projector(path.name))
    if not names:
        return None
    text = read_info(llm)
    ranked = sorted(best_projectors(names, llm.name), key=lambda name: -_likeness(llm.name, name))
    paths = [llm.with_name(name) for name in ranked]
    # Where none fits, the check of the likest says why.
    return next((path for path in paths if _could_fit(text, path)), None) or check_pair(llm, paths[0])[1].path


def _fits(text: GgufInfo, vision: GgufInfo) -> bool:
    return None in {text.width, vision.projector_width} or text.width == vision.projector_width


def _could_fit(text: GgufInfo, projector: Path) -> bool:
    try:
        vision = read_info(projector)
    except ModelError:  # a damaged neighbour is no reason to refuse a good one
        return False
    return vision.is_projector and vision.has_vision and _fits(text, vision)


def _likeness(model: str, projector: str) -> int:
    """Characters of the longest piece both names share, tags left out."""
    return SequenceMatcher(None, stem(model), stem(projector), autojunk=False).find_longest_match().size
