"""One finding of doctor as data, and the commands that fix it."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from opsin.core.settings import EngineSettings, as_flags
from opsin.native.devices import CPU_NAMES

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: a `name` that stays, one sentence, plain JSON values, and the shell command that fixes it."""

    name: str
    status: Status
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fix: str | None = None


def worst(checks: Iterable[Check]) -> Status:
    """The worst status of all; "ok" of none."""
    return max((check.status for check in checks), key=("ok", "warn", "fail").index, default="ok")


def serve_command(settings: EngineSettings, *words: object, **update: object) -> str:
    """`opsin serve` with these settings, some of them changed, and more words, quoted for a shell."""
    settings = settings.model_copy(update=update)
    # The server has another default for parallel, and opsin.toml may have one for what is changed.
    asked = {"parallel", *update}
    chosen = {
        name: value
        for name, field in EngineSettings.model_fields.items()
        if (value := getattr(settings, name)) is not None and (value != field.default or name in asked)
    }
    return shlex.join(["opsin", "serve", *as_flags(chosen), *map(str, words)])


def means_cpu(device: str | None) -> bool:
    """Whether the setting of a device is a word for the CPU."""
    return device is not None and device.strip().lower() in CPU_NAMES
