#!/usr/bin/env python3
"""Decoding with tokens sampled on the device beside sampling on the CPU, in turn.

    python bench/device_sampling.py --model m.gguf --streams 1 8 32 --runs 4 --json-out device_sampling.json

So many text answers of 128 tokens run together, greedy and with the default sampling, on two engines that differ in
`device_sampling` alone. What was measured is written as it comes. Needs the package `opsin`; this checkout's is used
where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from batched_bench import TOKENS, Batch, measure_batch
from opsin.compose import Runtime, open_runtime
from opsin.core.errors import OpsinError
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.prompt import Message

# No guard: a model of random weights repeats itself.
SAMPLING = {
    "greedy": SamplingParams(temperature=0, max_tokens=TOKENS, guard=False),
    "default": SamplingParams(max_tokens=TOKENS, guard=False),
}


def compare(runtimes: dict[str, Runtime], streams: int, sampling: str, runs: int) -> dict[str, Any]:
    """Medians of both sides ("cpu" and "device"), and of the runs' own ratios. Raises BadInput, EngineError."""
    found: dict[str, list[Batch]] = {side: [] for side in runtimes}
    for runtime in runtimes.values():
        # The samplers on the device change some steps after what is asked for does.
        prompt = runtime.prompts.build([Message("user", "Tell me all about it.")])
        runtime.engine.submit(prompt, SAMPLING[sampling].model_copy(update={"ignore_eos": True})).result()
    for run in range(runs):
        # Every second run begins with the other side, so that neither always follows the other.
        for side in list(runtimes)[:: 1 if run % 2 == 0 else -1]:
            found[side].append(measure_batch(runtimes[side], streams, sampling=SAMPLING[sampling]))
    row: dict[str, Any] = {"streams": streams, "sampling": sampling}
    row |= {f"{side}_tokens_s": round(median(one.tokens_s for one in each), 1) for side, each in found.items()}
    row |= {f"{side}_sample_share": round(median(one.sample_share for one in each), 3) for side, each in found.items()}
    pairs = zip(found["device"], found["cpu"], strict=True)
    row["ratio"] = round(median(one.tokens_s / other.tokens_s for one, other in pairs), 4)
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measure every number of streams and way to sample; print a line each, and write the document after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="language model, a GGUF file")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="answers at once (1 8 32)")
    parser.add_argument("--runs", type=int, default=4, help="runs of each; medians are shown (4)")
    parser.add_argument("--json-out", type=Path, help="also write the JSON document to this file")
    given = parser.parse_args(arguments)
    most = max(given.streams)
    settings = EngineSettings(ctx=512 * most, parallel=most, disk_cache=False)
    sides = {"cpu": settings, "device": settings.model_copy(update={"device_sampling": True})}
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        runtimes = {
            side: stack.enter_context(closing(open_runtime(given.model, None, one, trial=False)))
            for side, one in sides.items()
        }
        model = runtimes["cpu"].engine.info.as_dict()
        for streams in given.streams:
            for sampling in SAMPLING:
                rows.append(row := compare(runtimes, streams, sampling, given.runs))
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                if given.json_out is not None:
                    document = {"kind": "device_sampling", "model": model, "runs": given.runs, "rows": rows}
                    given.json_out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except OpsinError as error:
        sys.exit(f"device_sampling: {error}")
