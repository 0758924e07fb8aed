#!/usr/bin/env python3
"""Rows per second of `opsin batch`, of a plain llama-cpp-python loop and of llama-server driven by clients.

    python bench/batch_rate.py --model m.gguf --mmproj mmproj.gguf --server llama-server --images 200 --runs 2

The same PNGs of 640×480 pixels, questions and answer lengths for all three, in turn in one run; the others get all
cores, Opsin chooses by itself. Loading does not count. `--questions 10` asks that many about each image; `--scenes`
takes drawn scenes, which the demo model knows, and compares every text with that of `opsin ask`. Needs the package
`opsin`, Pillow, numpy and httpx.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

from opsin import Opsin
from opsin.bench.drivers import listening
from opsin.core.answer import TokenLogprob

ROOT = Path(__file__).resolve().parents[1]
SIZE = (640, 480)
CLIENTS = SLOTS = 8
CTX = 8192
# What a plain user of llama-cpp-python writes; rows come as JSON on standard input.
LOOP = """
import base64, json, sys, time
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Llava15ChatHandler
class Handler(Llava15ChatHandler):
    DEFAULT_SYSTEM_MESSAGE = None
    CHAT_FORMAT = Llava15ChatHandler.CHAT_FORMAT.replace("\\nUSER: ", {user!r}).replace("\\nASSISTANT: ", {assistant!r})
model, mmproj, threads, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
llm = Llama(model, chat_handler=Handler(clip_model_path=mmproj, verbose=False), n_ctx=2048, n_batch=1024,
            n_ubatch=1024, n_threads=threads, n_threads_batch=threads, n_gpu_layers=-1, verbose=False)
def ask(path, question):
    url = "data:image/png;base64," + base64.b64encode(open(path, "rb").read()).decode()
    content = [{{"type": "image_url", "image_url": {{"url": url}}}}, {{"type": "text", "text": question}}]
    done = llm.create_chat_completion([{{"role": "user", "content": content}}], max_tokens=tokens, temperature=0)
    return done["choices"][0]["message"]["content"], done["usage"]["completion_tokens"]
rows = json.load(sys.stdin)
ask(*rows[0][1:])
began, made = time.perf_counter(), [ask(path, question) for _, path, question in rows[1:]]
print(json.dumps({{"seconds": time.perf_counter() - began, "tokens": sum(n for _, n in made)}}))
"""


def paint(folder: Path, images: int, *, scenes: bool) -> list[Path]:
    """PNGs, all different: smooth noise, or drawn scenes; the last one is to warm up with."""
    if scenes:
        sys.path.append(str(ROOT))
        from training.scenes import make_scene, render  # type: ignore[import-not-found]
    paths = [folder / f"{number:06}.png" for number in range(images + 1)]
    for number, path in enumerate(paths):
        draw = np.random.default_rng(number)
        if scenes:
            render(make_scene("heldout", number)).save(path)
        else:
            small = Image.fromarray(draw.integers(0, 256, (SIZE[1] // 16, SIZE[0] // 16, 3), np.uint8))
            small.resize(SIZE, Image.Resampling.BICUBIC).save(path)
    return paths


def by_batch(rows: list[tuple[str, str, str]], given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`opsin batch` over a table of the rows."""
    table, out = folder / "rows.csv", folder / "out.jsonl"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "image", "question"), *rows])
    command = [sys.executable, "-m", "opsin", "batch", str(table), "{question}", "-o", str(out), "--overwrite"]
    command += ["--id", "id", "--image-column", "image", "--no-disk-cache", "--no-guard", "--temperature", "0"]
    command += ["--max-tokens", str(given.max_tokens), *pair(given)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    said = re.search(r"rows in ([\d.,]+) s", done.stderr)
    assert said, done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    tokens = sum(row["usage"]["completion_tokens"] for row in found)
    texts = {row["id"]: row["text"] for row in found}
    return {"seconds": float(said[1].replace(",", "")), "tokens": tokens, "rows": len(found), "texts": texts}


def differing(
    rows: list[tuple[str, str, str]], texts: dict[str, str], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows whose text is not that of `opsin ask`, with both.

    `gap` is how far apart in log probability the two likeliest tokens were where one differs from a third answer.
    """
    command = [sys.executable, "-m", "opsin", "ask", str(Path(rows[0][1]).parent), rows[0][2], "--json", "-q"]
    command += [
        "--no-disk-cache",
        "--no-guard",
        "--temperature",
        "0",
        "--max-tokens",
        str(given.max_tokens),
        *pair(given),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    alone = {row["source"]: row["text"] for row in map(json.loads, done.stdout.splitlines())}
    both = ({"id": name, "batch": texts[name], "ask": alone[path], "path": path} for name, path, _ in rows)
    found: list[dict[str, Any]] = [one for one in both if one["batch"] != one["ask"]]
    if found:
        with Opsin(given.model, given.mmproj, disk_cache=False, config=False) as opsin:
            for one in found:
                answer = opsin.ask(
                    one.pop("path"), rows[0][2], temperature=0, max_tokens=given.max_tokens, guard=False, logprobs=2
                )
                one["gap"] = max(gap(answer.logprobs, one["batch"]), gap(answer.logprobs, one["ask"]))
    return found


def gap(steps: Sequence[TokenLogprob], text: str) -> float:
    """How far apart the two likeliest tokens were where an answer first differs from a text; 0 where it does not.

    Where both of them fit the text (" a" and " an"), it may have been there.
    """
    least, so_far, whole = float("inf"), b"", text.strip().encode()
    for step in steps:
        (_, _, first), (_, other, second) = step.top[:2]
        if whole.startswith((so_far + other).lstrip()):
            least = min(least, first - second)
        so_far += step.piece
        if not whole.startswith(so_far.strip()):
            return min(least, first - second)
    return 0.0


def by_loop(rows: list[tuple[str, str, str]], warm: tuple[str, str, str], given: argparse.Namespace) -> dict[str, Any]:
    """llama-cpp-python, one row after another; `warm` is asked before and does not count."""
    arguments = [given.model, given.mmproj, str(given.threads), str(given.max_tokens)]
    code = LOOP.format(user=given.user, assistant=given.assistant)
    text = json.dumps([warm, *rows])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], input=text, capture_output=True, text=True, check=True
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "rows": len(rows)}


def by_server(
    rows: list[tuple[str, str, str]], warm: tuple[str, str, str], given: argparse.Namespace
) -> dict[str, Any]:
    """llama-server, with as many clients as it has slots; `warm` is asked before and does not count."""
    command = [given.server, "-m", given.model, "--mmproj", given.mmproj, "-c", str(CTX), "-np", str(SLOTS)]
    command += [
        "-b",
        "2048",
        "-ub",
        "1024",
        "-t",
        str(given.threads),
        "-tb",
        str(given.threads),
        "--no-webui",
        "-ngl",
        "99",
    ]
    with tempfile.TemporaryFile() as log, listening("llama-server", command, "/health", log) as (_, address):

        def ask(row: tuple[str, str, str]) -> int:
            url = "data:image/png;base64," + base64.b64encode(Path(row[1]).read_bytes()).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row[2]}]
            body = {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": given.max_tokens,
                "temperature": 0,
            }
            answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
            return int(answer["usage"]["completion_tokens"])

        with httpx.Client(base_url=address, timeout=600, limits=httpx.Limits(max_connections=16)) as http:
            ask(warm)
            with ThreadPoolExecutor(CLIENTS) as clients:
                began = time.perf_counter()
                tokens = sum(clients.map(ask, rows))
                return {"seconds": time.perf_counter() - began, "tokens": tokens, "rows": len(rows)}


def pair(given: argparse.Namespace) -> list[str]:
    """The flags that name the pair."""
    return ["--model", given.model, "--mmproj", given.mmproj]


def main() -> None:
    """Measure all three in turn, print, and write to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="language model, a GGUF file")
    parser.add_argument("--mmproj", required=True, help="projector, a GGUF file")
    parser.add_argument("--server", help="llama-server's program")
    parser.add_argument("--user", default="USER: ", help="what the loop writes before a question (USER: )")
    parser.add_argument("--assistant", default=" ASSISTANT:", help="and before its answer ( ASSISTANT:)")
    parser.add_argument("--images", type=int, default=200, help="images (200)")
    parser.add_argument("--questions", type=int, default=1, help="questions about each image (1)")
    parser.add_argument("--scenes", action="store_true", help="drawn scenes instead of noise")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of an answer (32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the others")
    parser.add_argument("--runs", type=int, default=2, help="runs of each (2)")
    parser.add_argument("--loop-rows", type=int, help="rows that the loop is asked, from the first on (all)")
    parser.add_argument("--json-out", type=Path, help="also write the JSON document to this file")
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {"opsin batch": [], "llama-cpp-python": [], "llama-server": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = [f"Question {number}: what is in this picture?" for number in range(given.questions)]
        asked = asked if given.questions > 1 else ["What is in this picture?"]
        *paths, last = paint(folder, given.images, scenes=given.scenes)
        warm = (last.stem, str(last), "What is in this picture?")
        rows = [(f"{path.stem}-{number}", str(path), text) for path in paths for number, text in enumerate(asked)]
        texts: dict[str, str] = {}
        for run in range(given.runs):
            sides = [
                ("opsin batch", lambda: by_batch(rows, given, folder)),
                ("llama-cpp-python", lambda: by_loop(rows[: given.loop_rows], warm, given)),
            ]
            sides += [("llama-server", lambda: by_server(rows, warm, given))] if given.server else []
            for side, measure in sides if run % 2 == 0 else reversed(sides):
                one = measure()
                texts = one.pop("texts", texts)
                found[side].append(one)
                shown = f"{one['rows'] / one['seconds']:.2f} rows/s, {one['tokens']:,} tokens"
                print(f"run {run + 1}, {side}: {shown}", flush=True)
        other = differing(rows, texts, given) if given.scenes else None
    rates = {side: median(one["rows"] / one["seconds"] for one in runs) for side, runs in found.items() if runs}
    better = max(rate for side, rate in rates.items() if side != "opsin batch")
    print(f"opsin batch is {rates['opsin batch'] / better:.2f} times as fast as the better of the others")
    if other is not None:
        print(f"{len(other)} of {len(rows)} texts differ from those of opsin ask: {other[:20]}")
    document = {
        "kind": "batch_rate", "machine": platform.processor() or platform.machine(), "opsin": version("opsin"),
        "llama_cpp_python": version("llama-cpp-python"), "model": Path(given.model).name, "images": given.images,
        "questions": given.questions, "scenes": given.scenes, "max_tokens": given.max_tokens, "threads": given.threads,
        "rows_s": rates, "ratio": rates["opsin batch"] / better, "not_as_ask": other, "runs": found,
    }  # fmt: skip
    if given.json_out is not None:
        given.json_out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
