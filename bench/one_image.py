#!/usr/bin/env python3
"""One image and a short answer: how long the load takes, the first answer, one about the same image, and a warm one.

    python bench/one_image.py --model m.gguf --mmproj p.gguf --runs 5 --json-out one_image.json

Greedy answers of 54 tokens about an image of 640×480 pixels, every stage in milliseconds: the first answer behind the
load, another question about its image, and medians of questions about new images. Shares are of what the device does
at best (`bench/ceilings.py`): the least time that encoding, prefill and decoding can take, by the time they took. Needs
the package `opsin`; this checkout's is used where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from ceilings import measure_rates
from opsin.bench.cost import Ceiling, ModelCost, read_cost
from opsin.bench.workloads import image_file
from opsin.compose import Runtime, open_runtime
from opsin.core.answer import Answer
from opsin.core.errors import OpsinError
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings, ImageSettings
from opsin.images import load_image
from opsin.prompt import Message

TOKENS = 54
QUESTIONS = ("What is this?", "What colours are there?")
_FIRST_IMAGE = 54_000  # no other bench has these


def ask(runtime: Runtime, number: int, question: str, tokens: int = TOKENS) -> tuple[Answer, float]:
    """The answer about the image of that number, and its wall time in milliseconds, reading of the file included."""
    file = image_file(_FIRST_IMAGE + number)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, guard=False)
    began = time.perf_counter()
    prompt = runtime.prompts.build([Message("user", [load_image(file, ImageSettings()), question])])
    answer = runtime.engine.submit(prompt, params).result()
    return answer, (time.perf_counter() - began) * 1e3


def row(answer: Answer, wall_ms: float) -> dict[str, Any]:
    """Stages in milliseconds, the wall time, and counts of tokens."""
    usage = {name: value for name, value in asdict(answer.usage).items() if name.endswith("tokens")}
    return {"wall_ms": round(wall_ms, 3), **{k: round(v, 3) for k, v in asdict(answer.stages).items()}, **usage}


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure of several answers."""
    return {name: median(one[name] for one in rows) for name in rows[0]}


def shares(cost: ModelCost, ceiling: Ceiling, warm: dict[str, Any]) -> dict[str, float | None]:
    """The least time of each part of an answer by the time it took; None where the file does not tell what it needs."""
    prompt, cached, answered = (int(warm[f"{name}_tokens"]) for name in ("prompt", "cached", "completion"))
    least_ms = {
        "encode": None if cost.encode_ops is None else cost.encode_ops / ceiling.matrix_ops_s * 1e3,
        "prefill": cost.prompt_seconds(ceiling, prompt - cached, cached) * 1e3,
        # The first token comes from the prompt's logits.
        "decode": sum(cost.step_seconds(ceiling, [prompt + step]) for step in range(1, answered)) * 1e3,
    }
    took_ms = {
        "encode": warm["encode_ms"],
        "prefill": warm["image_prefill_ms"] + warm["text_prefill_ms"],
        "decode": warm["decode_ms"] + warm["sample_ms"],
    }
    return {
        name: None if least is None or took_ms[name] <= 0 else round(least / took_ms[name], 4)
        for name, least in least_ms.items()
    }


def measure(model: Path, mmproj: Path, runs: int) -> dict[str, Any]:
    """Load the pair and ask. Raises ModelError, EngineError."""
    rates = measure_rates()
    began = time.perf_counter()
    with closing(open_runtime(model, mmproj, EngineSettings(disk_cache=False), trial=False)) as runtime:
        load_s = time.perf_counter() - began
        first = row(*ask(runtime, 0, QUESTIONS[0]))
        same = row(*ask(runtime, 0, QUESTIONS[1]))
        rows = [row(*ask(runtime, number, QUESTIONS[0])) for number in range(1, runs + 1)]
        limits, info = runtime.engine.limits, runtime.engine.info.as_dict()
    warm = medians(rows)
    return {
        "kind": "one_image",
        "model": info,
        "settings": {"n_ctx": limits.n_ctx, "ubatch": limits.n_ubatch, "slots": limits.n_seq_max},
        "ceilings": rates.document(),
        "load_s": round(load_s, 3),
        "first": first,
        "same_image": same,
        "warm": warm,
        "shares": shares(read_cost(model, mmproj), rates.ceiling, warm),
        "warm_runs": rows,
    }


def as_text(found: dict[str, Any]) -> str:
    """The figures that people ask for first."""
    warm, first, same = found["warm"], found["first"], found["same_image"]
    prefill = warm["image_prefill_ms"] + warm["text_prefill_ms"]
    parts = ", ".join(f"{name} {share:.0%}" for name, share in found["shares"].items() if share is not None)
    return (
        f"{found['model']['llm_file']}: load {found['load_s']:.2f} s, first answer {first['wall_ms']:.0f} ms,"
        f" same image {same['wall_ms']:.0f} ms, warm {warm['wall_ms']:.0f} ms\n"
        f"warm: encode {warm['encode_ms']:.1f} ms, prefill {prefill:.1f} ms, decode {warm['decode_ms']:.1f} ms,"
        f" {int(warm['completion_tokens'])} tokens; of the ceiling: {parts}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the document to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="language model, a GGUF file")
    parser.add_argument("--mmproj", type=Path, required=True, help="projector, a GGUF file")
    parser.add_argument("--runs", type=int, default=5, help="warm answers; medians are shown (5)")
    parser.add_argument("--json-out", type=Path, help="also write the JSON document to this file")
    given = parser.parse_args(arguments)
    found = measure(given.model, given.mmproj, given.runs)
    if given.json_out is not None:
        given.json_out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(as_text(found))


if __name__ == "__main__":
    try:
        main()
    except OpsinError as error:
        sys.exit(f"one_image: {error}")
