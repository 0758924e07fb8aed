"""A language model and the projector that turns pictures into its embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
