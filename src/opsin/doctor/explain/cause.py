"""Why a request was slow, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Where = Literal["load", "encode", "prefill", "decode", "all"]


@dataclass(frozen=True, slots=True)
class Cause:
    """One cause.

    `name` stays the same from version to version. `seconds` is what it costs, `at_most` if the log only bounds it by
    the stage that it slows (None: the log does not say), and `arithmetic` the sum by which that was found.
    `saves_seconds` is what the remedy is expected to save, None where the log cannot tell. A `symptom` names a stage
    that is slow for a reason that the log does not show; it is left out where a cause for the same stage is known.
    """

    name: str
    where: Where
    seconds: float | None
    arithmetic: str
    message: str
    remedy: str
    saves_seconds: float | None = None
    symptom: bool = False
    at_most: bool = False

    def as_dict(self) -> dict[str, Any]:
        """A row of `opsin explain --json`: plain values, seconds rounded to milliseconds."""
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}
