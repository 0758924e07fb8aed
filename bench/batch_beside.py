#!/usr/bin/env python3
"""What a batch does to live requests, and they to it: first tokens and rows per second, apart and together.

    python bench/batch_beside.py --model m.gguf --mmproj mmproj.gguf --rows 1000 --json-out batch_beside.json

`opsin serve` gets a live streamed request every two seconds, with a new image each or (`--known`) about one image; a
batch of that many rows with an image each is answered beside it, and alone. Needs the package `opsin`, openai, Pillow
and numpy.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from openai import OpenAI
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZE = (640, 480)
EVERY = 2.0


def body(number: int, tokens: int, **more: Any) -> dict[str, Any]:
    """A request about a new PNG of smooth noise."""
    draw, file = np.random.default_rng(number), io.BytesIO()
    small = Image.fromarray(draw.integers(0, 256, (SIZE[1] // 16, SIZE[0] // 16, 3), np.uint8))
    small.resize(SIZE, Image.Resampling.BICUBIC).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in this picture?"}]
    same = {"model": "m", "temperature": 0, "max_tokens": tokens, "messages": [{"role": "user", "content": content}]}
    return {**same, **more}


class Live(threading.Thread):
    """Live requests, one every two seconds, until told to stop; `first` are seconds to the first token.

    `stages` are those of each answer, in milliseconds.
    """

    def __init__(self, client: OpenAI, begin: int, tokens: int, *, known: bool) -> None:
        super().__init__(daemon=True)
        self._client, self._number, self._tokens, self._known = client, begin, tokens, known
        if known:
            list(client.chat.completions.create(**body(begin, tokens, stream=True)))
        self._told = threading.Event()
        self.first: list[float] = []
        self.stages: list[dict[str, float]] = []
        self.start()

    def run(self) -> None:
        """Ask until `end` is called."""
        while not self._told.is_set():
            sent = body(self._number, self._tokens, stream=True)
            if self._known:
                sent["messages"][0]["content"][1]["text"] = f"Question {len(self.first)}: what is in this picture?"
            began = time.perf_counter()
            seen = False
            for event in self._client.chat.completions.create(**sent):
                if not seen and event.choices and event.choices[0].delta.content:
                    self.first.append(time.perf_counter() - began)
                    seen = True
                if stages := (event.model_extra or {}).get("stages"):
                    self.stages.append(stages)
            self._number += not self._known
            self._told.wait(max(0.0, EVERY - (time.perf_counter() - began)))

    def end(self) -> Live:
        """Stop."""
        self._told.set()
        self.join()
        return self

    def medians(self) -> dict[str, float]:
        """Of the stages that took time."""
        found = {name: median(one.get(name, 0.0) for one in self.stages) for name in self.stages[0]}
        return {name: ms for name, ms in found.items() if ms >= 1.0}


def run_batch(client: OpenAI, path: Path) -> float:
    """Rows per second of one batch, from its start to its last row."""
    with path.open("rb") as file:
        sent = client.files.create(file=file, purpose="batch")
    batch = client.batches.create(input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h")
    began = 0.0
    while batch.status not in {"completed", "failed", "expired", "cancelled"}:
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
        began = began or (time.perf_counter() if batch.status == "in_progress" else 0.0)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    return batch.request_counts.completed / (time.perf_counter() - began)


def main() -> None:
    """Measure live requests alone, the batch alone, and both together; print, and write to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="language model, a GGUF file")
    parser.add_argument("--mmproj", required=True, help="projector, a GGUF file")
    parser.add_argument("--rows", type=int, default=1000, help="rows of the batch (1,000)")
    parser.add_argument("--rows-alone", type=int, help="rows of the batch that runs alone (as many)")
    parser.add_argument("--alone", type=float, default=60.0, help="seconds of live requests alone (60)")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of an answer (32)")
    parser.add_argument("--known", action="store_true", help="live requests are new questions about one image")
    parser.add_argument("--json-out", type=Path, help="also write the JSON document to this file")
    given = parser.parse_args()
    rows_alone = given.rows_alone or given.rows
    with tempfile.TemporaryDirectory() as name:
        halves = [Path(name) / "first.jsonl", Path(name) / "second.jsonl"]
        for half, path in enumerate(halves):
            with path.open("w") as file:
                for number in range(half * rows_alone, rows_alone + half * given.rows):
                    request = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions"}
                    file.write(json.dumps({**request, "body": body(number, given.max_tokens)}) + "\n")
        command = [
            sys.executable,
            "-m",
            "opsin",
            "serve",
            "--model",
            given.model,
            "--mmproj",
            given.mmproj,
            "--port",
            "0",
        ]
        command += ["--no-disk-cache", "--no-guard", "--max-file-bytes", str(2**32)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "XDG_DATA_HOME": name}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stderr is not None
            found = next(match for line in process.stderr if (match := re.search(r"ready at (http://\S+)", line)))
            threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
            client = OpenAI(base_url=f"{found[1]}/v1", api_key="none", timeout=600, max_retries=0)
            live = Live(client, 10_000_000, given.max_tokens, known=given.known)
            time.sleep(given.alone)
            live_alone = live.end()
            rate_alone = run_batch(client, halves[0])
            live = Live(client, 20_000_000, given.max_tokens, known=given.known)
            rate_beside = run_batch(client, halves[1])
            live_beside = live.end()
        finally:
            process.terminate()
            process.wait()
    alone, beside = live_alone.first, live_beside.first
    document = {
        "kind": "batch_beside", "opsin": version("opsin"), "model": Path(given.model).name, "rows": given.rows,
        "rows_alone": rows_alone, "known": given.known,
        "first_token_s": {"alone": median(alone), "beside": median(beside), "requests": [len(alone), len(beside)]},
        "stages_ms": {"alone": live_alone.medians(), "beside": live_beside.medians()},
        "rows_s": {"alone": rate_alone, "beside": rate_beside},
        "first_token_ratio": median(beside) / median(alone), "rate_ratio": rate_beside / rate_alone,
    }  # fmt: skip
    print(json.dumps(document, indent=2))
    if given.json_out is not None:
        given.json_out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
