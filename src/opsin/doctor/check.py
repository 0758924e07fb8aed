"""A finding as data: what was looked at, how it stands, what it was seen by, and what to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    `name` is `group.what` ("build.gpu", "placement.encoder") and stays the same from version to version, so that
    scripts can look for it. `message` is one plain sentence: what is so, and for warn and fail how to mend it.
    `evidence` holds plain JSON values with units in their names. `fix` is a command line that a shell can run as it
    is, None where no single command mends it.
    """

    name: str
    status: Status
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fix: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row of `opsin doctor --json`."""
        return {
            "name": self.name,
            "status": self.status,
            "message": self.message,
            "evidence": dict(self.evidence),
            "fix": self.fix,
        }


def worst(checks: Iterable[Check]) -> Status:
    """The worst status of all; "ok" of none."""
    return max((check.status for check in checks), key=("ok", "warn", "fail").index, default="ok")
