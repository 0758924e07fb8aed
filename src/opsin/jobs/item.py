"""The rows of a job's input: each has a name, images, and what a prompt's template may use."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsin.core.errors import OpsinError


@dataclass(frozen=True, slots=True)
class FilePart:
    """An image inside a file, as in a tar: `size` bytes from `offset` on."""

    path: str
    offset: int
    size: int


ImageRef = str | bytes | FilePart
"""Where an image is: a path or an address, its bytes, or a part of a file."""


@dataclass(frozen=True, slots=True)
class Item:
    """One row. `source` is what the output says of where the image is from; `columns` are for the prompt's template.

    `body` is a whole chat request, where the input is a batch in OpenAI's form. `error` says why a row cannot be asked:
    it becomes an error row.
    """

    id: str
    source: str
    images: tuple[ImageRef, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    error: OpsinError | None = None


@dataclass(slots=True)
class Source:
    """The rows of an input, from the start each time (or only `once`). Iterating raises BadInput.

    `total` rows, where that is cheap to know; `columns` of a table; `folder` that ids are relative to; `skipped` counts
    files that are no rows, by why; `is_requests`: OpenAI's batch form; `note` is a sentence for the user.
    """

    read: Callable[[], Iterator[Item]]
    total: int | None = None
    columns: tuple[str, ...] | None = None
    folder: Path | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    is_requests: bool = False
    once: bool = False
    note: str = ""

    def __iter__(self) -> Iterator[Item]:
        return self.read()
