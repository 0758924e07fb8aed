"""How often the guard stops text that people and programs really wrote: run it over 1,000 files of this machine.

    PYTHONPATH=src python tests/guard/false_stops.py [-o docs/results/guard_false_stops.json] [--half tuning]

Python sources, JSON, CSV and documentation from the system, the Python installation and its packages; files are taken
in the order of the hash of their content, and equal files once. The constants of the guard were chosen with the
`tuning` half of the hashes in view; the figure that counts is that of the `held-out` half, the default. A source file
is no answer: data tables of thousands of equal lines are in it, so the count errs to the high side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pieces import pieces

from opsin.engine.guard import Guard

KINDS = {
    "python": ((".py",), 400),
    "json": ((".json",), 230),
    "csv": ((".csv", ".tsv"), 30),
    "documentation": ((".md", ".rst", ".txt", ".html"), 340),
}
MIN_TOKENS = 300
MAX_TOKENS = 4_000
READ_BYTES = 48_000


def candidates(suffixes: tuple[str, ...]) -> Iterator[Path]:
    roots = {Path("/usr"), Path(sys.base_prefix), Path(sys.prefix)}
    for root in sorted(roots):
        yield from (path for path in root.rglob("*") if path.suffix in suffixes and path.is_file())


def chosen(suffixes: tuple[str, ...], wanted: int, half: str) -> Iterator[tuple[Path, list[tuple[int, str]]]]:
    """The first `wanted` usable files of a kind, in the order of their content's hash."""
    by_hash: dict[str, Path] = {}
    for path in candidates(suffixes):
        try:
            with path.open("rb") as file:
                head = file.read(READ_BYTES)
        except OSError:
            continue
        if len(head) > 800:
            by_hash.setdefault(hashlib.sha256(head).hexdigest(), path)
    parity = 0 if half == "tuning" else 1
    taken = 0
    for digest in sorted(by_hash):
        if int(digest[-1], 16) % 2 != parity and len(by_hash) > 2 * wanted:
            continue
        head = by_hash[digest].read_bytes()[:READ_BYTES]
        try:
            text = head.decode("utf-8", "strict" if len(head) < READ_BYTES else "ignore")
        except UnicodeDecodeError:
            continue
        tokens = pieces(text)[:MAX_TOKENS]
        if len(tokens) >= MIN_TOKENS:
            yield by_hash[digest], tokens
            taken += 1
            if taken == wanted:
                return


def run(half: str) -> dict[str, object]:
    stopped, by_kind, total, seconds = [], {}, 0, 0.0
    for kind, (suffixes, wanted) in KINDS.items():
        files = 0
        for path, tokens in chosen(suffixes, wanted, half):
            files += 1
            guard = Guard()
            began = time.process_time()
            for count, (token, text) in enumerate(tokens, 1):
                verdict = guard.feed(token, text)
                if verdict is not None:
                    stopped.append({"name": path.name, "kind": kind, "reason": verdict.reason, "at_token": count})
                    break
            seconds += time.process_time() - began
            total += count
        by_kind[kind] = {"files": files, "stopped": sum(row["kind"] == kind for row in stopped)}
    return {
        "half": half,
        "files": sum(row["files"] for row in by_kind.values()),
        "tokens": total,
        "cpu_microseconds_a_token": round(seconds / total * 1e6, 2),
        "false_stops": len(stopped),
        "by_reason": dict(Counter(row["reason"] for row in stopped)),
        "by_kind": by_kind,
        "stopped": stopped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write the result here too")
    parser.add_argument("--half", choices=["tuning", "held-out"], default="held-out")
    arguments = parser.parse_args()
    result = json.dumps(run(arguments.half), indent=2)
    print(result)
    if arguments.output:
        arguments.output.write_text(result + "\n")


if __name__ == "__main__":
    main()
