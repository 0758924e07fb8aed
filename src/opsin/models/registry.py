"""The names users know, and the repository each stands for, as `known.toml` lists them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from opsin.core.errors import ModelNotFound
from opsin.core.files import read_table
from opsin.models.gguf import best_model, best_projectors


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One model by the name users know. The files are named where a repository holds several models.

    `quantisation` is the tag looked for when the user gives none; empty means llama.cpp's order. `weights` is the type
    of the usual download; `ocr` marks models that read text and do little else.
    """

    name: str
    title: str
    repo: str
    licence: str
    aliases: Sequence[str] = ()
    quantisation: str = ""
    weights: str = "q4_k_m"
    ocr: bool = False
    llm_file: str | None = None
    mmproj_file: str | None = None


KNOWN_MODELS = tuple(KnownModel(name, **row) for name, row in read_table(__file__, "known.toml").items())


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user asked for: a repository, a quantisation tag ("" for none) and, when it is one we know, its row."""

    repo: str
    tag: str = ""
    known: KnownModel | None = None

    @property
    def name(self) -> str:
        """What a user would type to get this again."""
        base = self.known.name if self.known else f"hf:{self.repo}"
        return f"{base}:{self.tag}" if self.tag else base

    def files_of(self, files: Sequence[str]) -> tuple[str | None, str | None]:
        """Language model and projector that are meant among the repository's files; None for one that is not there."""
        row = self.known
        if row and row.llm_file and not self.tag:
            llm, mmproj = (name if name in files else None for name in (row.llm_file, row.mmproj_file))
            return llm, mmproj
        llm = best_model(files, self.tag, row.quantisation if row else "")
        return llm, next(iter(best_projectors(files, llm)), None) if llm else None


_REPO = re.compile(r"[\w-]+(?:\.[\w-]+)*/[\w-]+(?:\.[\w-]+)*", re.ASCII)


def is_known(text: str) -> bool:
    """Whether `look_up` knows the name without asking a hub."""
    return _normal(text.partition(":")[0]) in _NAMES


def look_up(text: str) -> Wanted:
    """Understand NAME, NAME:QUANT, hf:OWNER/NAME or hf:OWNER/NAME:QUANT.

    Names are forgiving about case, dashes, dots and a v before a number. Raises ModelNotFound with the nearest names.
    """
    base, _, tag = text.removeprefix("hf:").partition(":")
    if text.startswith("hf:"):
        if not _REPO.fullmatch(base):
            raise ModelNotFound(f"{text!r} names no repository: write hf:OWNER/NAME or hf:OWNER/NAME:QUANT")
        row = next((row for row in KNOWN_MODELS if row.repo.lower() == base.lower() and row.llm_file is None), None)
        return Wanted(base, tag, row)
    row = _NAMES.get(_normal(base))
    if row is not None:
        return Wanted(row.repo, tag, row)
    if _REPO.fullmatch(base):
        raise ModelNotFound(f"there is no file or known model {base!r}: for a repository write hf:{text}")
    near = get_close_matches(_normal(base), _NAMES, n=3, cutoff=0.5)
    names = sorted({_NAMES[name].name for name in near}) or ["llava-1.5-7b", "qwen3-vl-4b"]
    raise ModelNotFound(
        f"there is no file or known model {base!r}: did you mean {' or '.join(names)}?"
        " `opsin models --known` lists all names, and hf:OWNER/NAME takes any repository"
    )


def _normal(name: str) -> str:
    return re.sub(r"v(?=\d)", "", re.sub(r"[^a-z0-9]", "", name.lower()))


_NAMES: dict[str, KnownModel] = {
    _normal(name): row for row in KNOWN_MODELS for name in (row.name, row.title, *row.aliases)
}
