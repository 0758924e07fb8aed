"""One command line from its words, as the shell of a system reads it."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
from collections.abc import Sequence


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
