"""A job's question: one text, or a template with names in braces that each row fills from its columns or metadata."""

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from opsin.core.errors import BadParameter
from opsin.images.metadata import NAMES
from opsin.jobs.item import Item

_NAME = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")
OWN = ("filename", "stem", "folder", "path", "id")
_RAW = ("exif_", "xmp_", "iptc_")
_LONGEST = 10_000  # characters of one value


class PromptTemplate:
    """`text` with `{name}` for each value; `{{name}}` is `{name}`, and all other braces stay, as those of JSON.

    `columns` are those of a table, or None. What is no column is looked up in the image's metadata. Raises BadParameter
    for a name that nothing has.
    """

    def __init__(self, text: str, columns: Collection[str] | None = None) -> None:
        self.text = text
        self.names = frozenset(name for _, name in _NAME.findall(text) if name)
        known = {*(columns or ()), *OWN}
        self.metadata = frozenset(self.names - known)
        """Names that only the image's metadata can have."""
        for name in sorted(self.metadata):
            if name not in NAMES and not name.startswith(_RAW):
                there = ", ".join(sorted(known | set(NAMES)))
                raise BadParameter(
                    f"The prompt names {{{name}}}, which nothing here has: use one of {there}, or write {{{{{name}}}}} "
                    "for the braces themselves."
                )

    def fill(self, item: Item, metadata: Mapping[str, str]) -> str:
        """The question of a row; what it lacks is empty."""
        path = PurePosixPath(item.source)
        own = {"filename": path.name, "stem": path.stem, "folder": path.parent.name, "path": item.source, "id": item.id}
        values: dict[str, Any] = {**metadata, **own, **item.columns}

        def value(found: re.Match[str]) -> str:
            if found[1] is not None:
                return f"{{{found[1]}}}"
            text = values.get(found[2])
            return "" if text is None else str(text)[:_LONGEST]

        return _NAME.sub(value, self.text)
