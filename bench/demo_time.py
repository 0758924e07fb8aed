#!/usr/bin/env python3
"""How long `opsin ask` takes on the demo model, from start to end of the process, as `time` shows it.

    python bench/demo_time.py --runs 7 --json-out docs/results/demo_ask.json

The first run, which fills the disk cache of the system, does not count. The JSON has all times, and the last run's row.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [
    "ask",
    "src/opsin/models/demo/shapes.png",
    "What is in this picture?",
    "--temperature",
    "0",
    "--no-disk-cache",
]


def main() -> None:
    """Measure, print, and write to a file if asked to."""
    parser = argparse.ArgumentParser(description="Wall time of `opsin ask` on the demo model.")
    parser.add_argument("--runs", type=int, default=7, help="runs that count (7)")
    parser.add_argument("--json-out", type=Path, help="also write the JSON document to this file")
    asked = parser.parse_args()
    opsin = [str(Path(sys.executable).with_name("opsin")), *COMMAND]

    def run(*more: str) -> tuple[float, str]:
        began = time.perf_counter()
        done = subprocess.run([*opsin, *more], cwd=ROOT, capture_output=True, text=True, check=True)
        return time.perf_counter() - began, done.stdout

    run()
    seconds = [run()[0] for _ in range(asked.runs)]
    document = {
        "kind": "demo_ask",
        "command": " ".join(["opsin", *COMMAND]),
        "platform": f"{platform.system()} {platform.machine()}",
        "seconds": [round(one, 3) for one in seconds],
        "median_seconds": round(median(seconds), 3),
        "row": json.loads(run("--json")[1]),
    }
    print(f"{document['median_seconds']:.2f} s, the median of {asked.runs} runs")
    if asked.json_out is not None:
        asked.json_out.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
