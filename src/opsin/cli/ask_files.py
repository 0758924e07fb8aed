"""Which images a command line of `opsin ask` means: files, addresses and what is in folders."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from opsin.cli.console import tell
from opsin.core.errors import BadParameter
from opsin.images import ENDINGS
from opsin.images.folder import is_image, list_files


def check_question(sources: Sequence[str], question: str) -> None:
    """Raise BadParameter if there is no question, also where the last argument is one more image, or no image."""
    if os.path.lexists(question) or (question.lower().endswith(ENDINGS) and not re.search(r"\s", question)):
        shown = " ".join([*sources, question])
        if sources and not os.path.lexists(sources[0]) and re.search(r"\s", sources[0]):
            raise BadParameter(f'The question comes last: opsin ask {question} "{sources[0]}"')
        raise BadParameter(f'The question is missing: opsin ask {shown} "What is this?"')
    images = [source for source in sources if not _is_word(source)]
    if len(images) < len(sources) > 1 and not re.search(r"\s", question):
        words = " ".join([*sources[len(images) :], question])
        raise BadParameter(f'Put the question in quotes: opsin ask {" ".join(images) or "IMAGE"} "{words}"')
    if not sources:
        raise BadParameter(f'The image is missing: opsin ask IMAGE "{question}"')
    if not question.strip():
        raise BadParameter("The question is empty: ask something.")


def expand_sources(sources: Sequence[str], *, recursive: bool) -> list[str]:
    """The sources, with the images of a folder in its place, in natural order (p2 before p10).

    Hidden files are left out. What else is left out is said: other files, and folders unless `recursive`. Raises
    BadParameter for a folder without an image.
    """
    found: list[str] = []
    for source in sources:
        folder = os.path.expanduser(source)  # noqa: PTH111 - as is the next: a name that is too long is no folder
        is_file = "://" in source or source.startswith("data:") or not os.path.isdir(folder)  # noqa: PTH112
        found += [source] if is_file else _in_folder(folder, recursive=recursive)
    return found


def _is_word(source: str) -> bool:
    return re.fullmatch(r"[^\W\d]+[,']?\w*", source) is not None and not os.path.lexists(source)


def _in_folder(folder: str, *, recursive: bool) -> list[str]:
    files, folders = list_files(
        Path(folder), recursive=recursive, on_error=lambda error: tell(f"({error.filename}: {error.strerror})")
    )
    images = dict.fromkeys(path for path in files if is_image(path))
    _say_left_out([path for path in files if path not in images], "file", "no image that can be read")
    _say_left_out(folders, "folder", "-r reads folders, too")
    if not images:
        raise BadParameter(f"There is no image in the folder {folder}: it holds no file named like one.")
    return list(images)


def _say_left_out(found: Sequence[str], what: str, why: str, most: int = 5) -> None:
    if found:
        names = [Path(path).name for path in found[:most]]
        more = f" and {len(found) - most:,} more" if len(found) > most else ""
        count = f"1 {what} was" if len(found) == 1 else f"{len(found):,} {what}s were"
        tell(f"({count} left out, {why}: {', '.join(names)}{more})")
