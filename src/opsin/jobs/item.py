"""One row of a job's input: its name, its images, and what a prompt's template may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
