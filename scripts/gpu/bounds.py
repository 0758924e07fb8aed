#!/usr/bin/env python3
"""Which bounds do the results of `measure.sh` keep? Prints yes, no or "not measured" for each, from the JSON files.

    python scripts/gpu/bounds.py RESULTS

Writes RESULTS/bounds.json. Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PEER = "llama-server"
Read = Callable[[str], Any]
"""The JSON document of that name. Raises OSError and ValueError."""
_ABSENT = (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, ZeroDivisionError)


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure and what it may be: at most or at least `limit`. `value` is None where it was not measured."""

    name: str
    value: float | None
    limit: float
    at_most: bool = True

    @property
    def answer(self) -> str:
        """Is it kept?"""
        if self.value is None:
            return "not measured"
        return "yes" if (self.value <= self.limit if self.at_most else self.value >= self.limit) else "no"

    def line(self) -> str:
        """One line of the table."""
        value = "" if self.value is None else f"{self.value:.4f}"
        return f"{self.answer:<12}  {value:>8}  {'<=' if self.at_most else '>='} {self.limit:<5g}  {self.name}"


def placement(read: Read, step: str, part: str) -> tuple[str, float]:
    """What doctor's document of that step says of a part: the status, and the share of its operations off the CPU."""
    check = next(one for one in read(f"{step}.out")["checks"] if one["name"] == f"placement.{part}")
    backends = check["evidence"].get("backends", {})
    return check["status"], sum(one["share_of_ops"] for name, one in backends.items() if name != "CPU")


def proved(read: Read) -> float:
    """The smaller share of operations on the GPU, of encoder and language model; 0 for one that doctor rejects."""
    found = [placement(read, "doctor", part) for part in ("encoder", "language_model")]
    return min(share if status == "ok" else 0.0 for status, share in found)


def caught(read: Read) -> float:
    """1 if doctor failed the encoder that was forced to the CPU."""
    return float(placement(read, "encoder_on_cpu", "encoder")[0] == "fail")


def ratio(read: Read, file: str, workload: str, figure: str) -> float:
    """Our time by llama-server's."""
    return float(read(file)["ratios"][PEER][workload][figure])


def decode_share(read: Read) -> float:
    """Our rate of one sequence by llama-server's, of the longest answers that were measured."""
    for file in ("long-128.json", "long-64.json"):
        try:
            return 1 / ratio(read, file, "W1", "token_ms")
        except _ABSENT:
            continue
    return 1 / ratio(read, "bench.json", "W1", "token_ms")


BOUNDS: tuple[tuple[str, float, bool, Callable[[Read], float]], ...] = (
    ("encoder and language model on the GPU, share of operations", 0.9, False, proved),
    ("doctor fails an encoder on the CPU", 1, False, caught),
    ("one image, 54 tokens, warm, in seconds", 0.4, True, lambda read: read("founding.json")["warm"]["wall_ms"] / 1e3),
    (f"decode of one sequence by {PEER}'s", 0.9, False, decode_share),
    ("32 streams by llama-batched-bench", 0.9, False, lambda read: read("batched-32.json")["of_llama_batched_bench"]),
    (f"W3 by {PEER}'s", 0.25, True, lambda read: ratio(read, "bench.json", "W3", "total_s")),
    (f"W4's median first token by {PEER}'s", 0.6, True, lambda read: ratio(read, "bench.json", "W4", "first_token_ms")),
)


def reader(folder: Path) -> Read:
    """Reads documents of that folder."""
    return lambda name: json.loads((folder / name).read_text(encoding="utf-8"))


def about(read: Read) -> str:
    """The pair and the device: the bounds are meant for LLaVA-1.5-7B in q4_0 on an H200."""
    try:
        found = read("founding.json")
        return f"{found['model']['llm_file']} on {found['ceilings']['device']}"
    except _ABSENT:
        return "unknown pair and device"


def bounds(read: Read) -> list[Bound]:
    """All bounds, with what the documents say."""
    found = []
    for name, limit, at_most, figure in BOUNDS:
        try:
            value = figure(read)
        except _ABSENT:  # the step did not run, or was cut off
            value = None
        found.append(Bound(name, value, limit, at_most))
    return found


def main() -> None:
    """Print the table, and write the document."""
    if len(sys.argv) != 2:
        sys.exit("bounds: name the folder of results")
    folder = Path(sys.argv[1])
    read = reader(folder)
    found = bounds(read)
    document = {"about": about(read), "bounds": [{**asdict(bound), "kept": bound.answer} for bound in found]}
    (folder / "bounds.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{about(read)}\n" + "".join(f"{bound.line()}\n" for bound in found))


if __name__ == "__main__":
    main()
