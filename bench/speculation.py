#!/usr/bin/env python3
"""What drafts are worth: the same greedy answers without and with `speculation`, in turn, one at a time.

    python bench/speculation.py --pairs 6 --force --json-out docs/results/speculation.json
    python bench/speculation.py --pairs 6 --count 8 --text --model tinyllama-1.1b-q4_0.gguf --mmproj mmproj.gguf

OCR-like answers say what is in drawn scenes with a sign; JSON answers fit one schema. An engine is opened for each run,
so that none has the answers of the run before. First it is shown what a batch of several rows costs. `--text` leaves
the images away, for models with random weights. Needs the package `opsin` and what `training` draws with.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

from opsin import Opsin
from opsin.compose import open_backend
from opsin.core.request import TokenBatch
from opsin.core.settings import EngineSettings
from opsin.engine import speculation
from opsin.models import resolve

ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
KINDS = ("describe_sign", "sign", "word", "number")
SCHEMA = {
    "type": "object",
    "properties": {
        "objects": {
            "type": "array",
            "maxItems": 4,
            "items": {
                "type": "object",
                "properties": {
                    "color": {"enum": ["red", "green", "blue", "yellow", "orange", "pink", "black", "white", "gray"]},
                    "shape": {"enum": ["circle", "square", "triangle", "star", "ring", "cross", "heart"]},
                    "place": {"enum": ["top left", "top", "top right", "left", "center", "right", "bottom"]},
                },
                "required": ["color", "shape", "place"],
            },
        },
        "text": {"type": "string", "maxLength": 12},
    },
    "required": ["objects", "text"],
}


def costs(model: Path, mmproj: Path | None, rounds: int) -> dict[int, float]:
    """Median milliseconds of a batch of so many rows that all have logits, behind 250 tokens."""
    with closing(open_backend(EngineSettings(model=model, mmproj=mmproj, ctx=1024))) as backend:
        assert backend.decode(TokenBatch(list(range(10, 260)), list(range(250)), [0] * 250, [249]))
        times: dict[int, list[float]] = {rows: [] for rows in ROWS}
        for _ in range(rounds + 1):
            for rows in ROWS:
                batch = TokenBatch(
                    list(range(20, 20 + rows)), list(range(250, 250 + rows)), [0] * rows, list(range(rows))
                )
                began = time.perf_counter()
                assert backend.decode(batch)
                backend.synchronize()
                times[rows].append(time.perf_counter() - began)
                backend.kv_remove(0, 250, -1)
    return {rows: round(statistics.median(each[1:]) * 1e3, 3) for rows, each in times.items()}


def scenes(count: int) -> Iterator[tuple[Any, str]]:
    """Images with signs, and OCR-like questions of all kinds about them."""
    from training.exam import label, questions_about
    from training.scenes import make_scene, render

    index = 0
    while count > 0:
        scene = make_scene("heldout", index)
        wanted = KINDS[index % len(KINDS)]
        for question in questions_about(scene, 7_000_021 + index) if scene.sign else ():
            if label(question, scene) == wanted and count > 0:
                yield render(scene), question.text
                count -= 1
        index += 1


def run(args: argparse.Namespace, asked: list[tuple[Any, str]], params: dict[str, Any], *, on: bool) -> dict[str, Any]:
    """All answers of a kind with a fresh engine."""
    with Opsin(args.model, args.mmproj, speculation=on, disk_cache=False) as opsin:
        answers = [opsin.ask(image, question, temperature=0, **params) for image, question in asked]
    timings = [answer.timings for answer in answers]
    return {
        "answers": [answer.tokens for answer in answers],
        "tokens": sum(one.predicted_n for one in timings),
        "decode_s": sum(one.predicted_ms for one in timings) / 1e3,
        "draft_n": sum(one.draft_n for one in timings),
        "draft_n_accepted": sum(one.draft_n_accepted for one in timings),
    }


def compare(args: argparse.Namespace, asked: list[tuple[Any, str]], params: dict[str, Any]) -> dict[str, Any]:
    """Runs in turn, each pair beginning with the other; times of tokens, and how many answers differ."""
    pairs = []
    for number in range(args.pairs):
        order = (False, True) if number % 2 == 0 else (True, False)
        done = {on: run(args, asked, params, on=on) for on in order}
        pairs.append((done[False], done[True]))
        print(f"  {done[False]['decode_s']:.2f} s, with drafts {done[True]['decode_s']:.2f} s", file=sys.stderr)
    first = pairs[0][1]
    return {
        "answers": len(asked),
        "tokens": first["tokens"],
        "draft_n": first["draft_n"],
        "draft_n_accepted": first["draft_n_accepted"],
        "differ": sum(
            one != other for off, on in pairs for one, other in zip(off["answers"], on["answers"], strict=True)
        ),
        "decode_s": [[round(off["decode_s"], 3), round(on["decode_s"], 3)] for off, on in pairs],
        "times_faster": round(statistics.median(off["decode_s"] / on["decode_s"] for off, on in pairs), 3),
    }


def main() -> None:
    """Print a table; write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--mmproj")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--count", type=int, default=100, help="answers of each kind")
    parser.add_argument("--tokens", type=int, default=160, help="longest answer")
    parser.add_argument("--rounds", type=int, default=20, help="batches of each size")
    parser.add_argument("--kinds", default="ocr,json")
    parser.add_argument("--force", action="store_true", help="also where a step takes no time, as the demo model's")
    parser.add_argument("--text", action="store_true", help="questions without images")
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args()
    if args.force:
        speculation.FASTEST = 0.0
    pair = resolve(args.model, args.mmproj)
    document: dict[str, Any] = {"machine": platform.machine(), "model": pair.llm.name, "pairs": args.pairs}
    cost = document["batch_ms"] = costs(pair.llm, pair.mmproj, args.rounds)
    print("rows  ms      by one row")
    for rows, ms in cost.items():
        print(f"{rows:4d}  {ms:7.2f} {ms / cost[1]:.2f}")
    asked = [((), f"what is in picture {i}?") for i in range(args.count)] if args.text else list(scenes(args.count))
    for kind in args.kinds.split(","):
        params: dict[str, Any] = {"max_tokens": args.tokens}
        if kind == "json":
            params["json_schema"] = json.dumps(SCHEMA)
        elif args.text:
            params["ignore_eos"] = True
        document[kind] = found = compare(args, asked, params)
        shown = {name: value for name, value in found.items() if name != "decode_s"}
        print(kind, json.dumps(shown))
    if args.json_out is not None:
        kept = json.loads(args.json_out.read_text(encoding="utf-8")) if args.json_out.exists() else {}
        args.json_out.write_text(json.dumps({**kept, **document}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
