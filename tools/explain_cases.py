"""Run `opsin explain` over a folder of logs: tools/explain_cases.py FOLDER [TABLE].

TABLE (explain_cases.toml) has, for a file's first letters, expressions that the explanation must hold and that it must
not hold. Ends with 1 if one of them fails. Logs of public threads stay outside the repository.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

from opsin.core.errors import BadInput
from opsin.doctor.explain import as_text, explain


def told(log: Path) -> str:
    """All that a reader sees, in one text."""
    try:
        with log.open("rb") as stream:
            found = explain(stream)
    except BadInput as error:
        return f"unknown: {error}"
    return "\n".join([*as_text(found), json.dumps(found.as_dict()["stages"])])


def wrong(text: str, case: dict[str, list[str]]) -> list[str]:
    """What the explanation lacks, and what it says though it must not."""
    lacks = [f"lacks {words!r}" for words in case.get("must", []) if not re.search(words, text, re.IGNORECASE)]
    return lacks + [f"says {words!r}" for words in case.get("never", []) if re.search(words, text, re.IGNORECASE)]


def main() -> int:
    """Print a line for each log of the table; 1 if one is wrong."""
    folder = Path(sys.argv[1])
    table = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("explain_cases.toml")
    failed = False
    for start, case in tomllib.loads(table.read_text(encoding="utf-8")).items():
        for log in sorted(folder.glob(f"{start}*")):
            faults = wrong(told(log), case)
            failed |= bool(faults)
            sys.stdout.write(f"{log.name}: {'; '.join(faults) or 'right'}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
