"""What is known of a loaded pair of language model and projector."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The names of a pair as `--json` prints them."""

    name: str
    architecture: str
    projector: str | None
    llm_file: str
    mmproj_file: str | None
    quantisation: str

    def as_dict(self) -> dict[str, str | None]:
        """The fields as plain values."""
        return asdict(self)
