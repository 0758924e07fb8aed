"""A finding as data: what was looked at, how it stands, what it was seen by, and what to run."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from opsin.core.settings import EngineSettings
from opsin.native.devices import CPU_NAMES
from opsin.native.memory import as_flags

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    `name` is `group.what` ("build.gpu", "placement.encoder") and stays the same from version to version, so that
    scripts can look for it. `message` is one plain sentence: what is so, and for warn and fail how to fix it.
    `evidence` holds plain JSON values with units in their names. `fix` is a command line that a shell can run as it
    is, None where no single command fixes it.
    """

    name: str
    status: Status
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fix: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row of `opsin doctor --json`."""
        return asdict(self)


def worst(checks: Iterable[Check]) -> Status:
    """The worst status of all; "ok" of none."""
    return max((check.status for check in checks), key=("ok", "warn", "fail").index, default="ok")


def serve_command(settings: EngineSettings, *words: object, **update: object) -> str:
    """`opsin serve` with these settings, some of them changed, and more words, quoted for a shell.

    A default that is asked for is written out, since the environment and opsin.toml may say otherwise.
    """
    settings = settings.model_copy(update=update)
    asked = {"parallel", *update}  # the server's own default of parallel is another
    chosen = {
        name: value
        for name, field in EngineSettings.model_fields.items()
        if (value := getattr(settings, name)) is not None and (value != field.default or name in asked)
    }
    return shell_line(["opsin", "serve", *as_flags(chosen), *map(str, words)])


def means_cpu(device: str | None) -> bool:
    """Whether the setting of a device is a word for the CPU."""
    return device is not None and device.strip().lower() in CPU_NAMES


def shell_line(words: Sequence[str], system: str | None = None) -> str:
    """The words quoted for a POSIX shell, or for `cmd` where `system` (as `platform` names it; None: this) is Windows.

    `cmd` replaces %NAME% inside quotes too, and nothing at its prompt keeps it from that.
    """
    if (system or platform.system()) != "Windows":
        return shlex.join(words)
    return " ".join(map(_for_cmd, words))


def _for_cmd(word: str) -> str:
    escaped = subprocess.list2cmdline([word])
    # It quotes at blanks alone, but & | < > ^ part commands in cmd, and a comma or semicolon does in PowerShell.
    if escaped.startswith('"') or re.fullmatch(r"[\w\\/:.=+-]+", word):
        return escaped
    return f'"{escaped}{escaped[len(escaped.rstrip(chr(92))) :]}"'
