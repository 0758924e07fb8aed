"""Runs the checks of every family of image models, and writes what they found: `python tools/families.py`.

The checks are tests: `tests/native/test_native_kinds.py` through the engine, `tests/parity/test_parity_kinds.py`
against llama.cpp's own server. What they found goes to `docs/results/families.json`, from which `tools/reference.py`
makes the table in `docs/families.md`. Exit code 1: a family failed a check.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(folder) for folder in (ROOT / "tools", ROOT / "src") if str(folder) not in sys.path]

from synth import FAMILIES, SHAPES  # noqa: E402 - the paths above come first

RESULT = ROOT / "docs" / "results" / "families.json"
FILES = ("tests/native/test_native_kinds.py", "tests/parity/test_parity_kinds.py")
CHECKS = {
    "encodes": ("the_probe_sees_every_kind", "an_image_laid_out_without_its_pixels"),
    "batches": ("many_at_once",),
    "caches": ("what_was_swapped_out", "one_that_goes_away"),
    "photo": ("a_photo_of_12_megapixels",),
    "agrees": ("the_top_20_agree", "the_comparison_can_fail", "next_tokens_are_neither_even"),
}


class Collector:
    """A pytest plugin: the outcome of each check, and what it recorded, by shape."""

    def __init__(self) -> None:
        self.failed: dict[str, set[str]] = defaultdict(set)
        self.passed: dict[str, set[str]] = defaultdict(set)
        self.recorded: dict[str, dict[str, Any]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Sort the outcome of one test into its check."""
        test, _, shape = report.nodeid.rpartition("::")[2].removesuffix("]").partition("[")
        check = next((name for name, tests in CHECKS.items() if any(part in test for part in tests)), None)
        if check is None or shape not in SHAPES:
            return
        if report.when == "call":
            self.recorded[shape].update(report.user_properties)
        if report.outcome != "passed":  # also where the fixture failed
            self.failed[shape].add(check)
        elif report.when == "call":
            self.passed[shape].add(check)


def row_of(name: str, found: Collector) -> dict[str, Any]:
    """What was found of a family: a check holds where it holds for all its shapes."""
    family, shapes = FAMILIES[name], [shape for shape in found.passed | found.failed if SHAPES[shape].family == name]
    recorded = [found.recorded[shape] for shape in shapes]
    return {
        "title": family.title,
        "projector": family.projector,
        "architecture": family.architecture,
        "shapes": shapes,
        "checks": {c: bool(shapes) and all(c in found.passed[s] - found.failed[s] for s in shapes) for c in CHECKS},
        "keeps_prefixes": all(row.get("keeps_prefixes", False) for row in recorded),
        "off_by": max((row["off_by"] for row in recorded if "off_by" in row), default=None),
    }


def main() -> None:
    """Run the checks and write the file."""
    found = Collector()
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *sys.argv[1:], *FILES], plugins=[found])
    if code not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
        sys.exit(int(code))
    rows = [row_of(name, found) for name in FAMILIES]
    result = {
        "command": "python tools/families.py",
        "llama_cpp_python": version("llama-cpp-python"),
        "server": f"xllamacpp {version('xllamacpp')}",
        "families": sorted(rows, key=lambda row: row["title"]),
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(not all(all(row["checks"].values()) for row in rows))


if __name__ == "__main__":
    main()
