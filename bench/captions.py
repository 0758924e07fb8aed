#!/usr/bin/env python3
"""Captions of a folder of new images: images per second by `opsin ask FOLDER`, and the stage that takes most of it.

    python bench/captions.py --model m.gguf --mmproj mmproj.gguf --images 64 --parallel 16 --json-out captions.json

Each size gets a folder of its own: photographs-like JPEGs of 640×480 pixels and of 12 megapixels, all different. The
time is that of the whole command, without loading the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = {"640x480": (640, 480), "12MP": (4000, 3000)}
QUESTION = "Describe the image in one sentence."
# Stages of one image that others wait for: the engine computes one thing at a time, and one thread reads the files.
ENGINE = ("preprocess", "encode", "image_prefill", "text_prefill")


def paint(path: Path, size: tuple[int, int], seed: int) -> None:
    """A JPEG of smooth noise, as large as a photograph's."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (size[1] // 16, size[0] // 16, 3), np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def caption(folder: Path, asked: list[str], slots: int) -> dict[str, Any]:
    """Ask about every image of the folder; images per second, and where the time went."""
    command = [sys.executable, "-m", "opsin", "ask", str(folder), QUESTION, "--json", "--parallel", str(slots), *asked]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    spent = Counter[str]()
    for row in rows:
        spent.update({name.removesuffix("_ms"): ms / 1e3 for name, ms in row["stages"].items() if name != "total_ms"})
    loading = max(row["stages"]["load_ms"] for row in rows) / 1e3
    wall = seconds - loading
    tokens = sum(row["usage"]["completion_tokens"] for row in rows)
    # What is left of the engine's time is decoding, which all slots share.
    engine = sum(spent[name] for name in ENGINE)
    reading = spent["fetch"] + spent["image_decode"]
    shares = {"reading and decoding files": reading, **{name: spent[name] for name in ENGINE}}
    shares["decode and the rest"] = max(0.0, wall - engine)
    return {
        "images": len(rows),
        "seconds": round(wall, 3),
        "images_s": round(len(rows) / wall, 3),
        "tokens_s": round(tokens / wall, 1),
        "shares": {name: round(value / wall, 3) for name, value in shares.items()},
        "bound_by": max(shares, key=lambda name: shares[name]),
    }


def main() -> None:
    """Measure every size, print, and write to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="language model, a GGUF file")
    parser.add_argument("--mmproj", required=True, help="projector, a GGUF file")
    parser.add_argument("--images", type=int, default=64, help="images of each size (64)")
    parser.add_argument("--parallel", type=int, default=16, help="slots (16)")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of a caption (32)")
    parser.add_argument("--json-out", type=Path, help="also write the JSON document to this file")
    given = parser.parse_args()
    asked = ["--model", given.model, "--mmproj", given.mmproj, "--no-disk-cache", "--no-guard"]
    asked += ["--max-tokens", str(given.max_tokens), "--temperature", "0"]
    found: dict[str, Any] = {"kind": "captions", "parallel": given.parallel, "max_tokens": given.max_tokens}
    with tempfile.TemporaryDirectory() as name:
        for size, pixels in SIZES.items():
            folder = Path(name) / size
            folder.mkdir()
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow computes outside Python's lock
                files = [folder / f"{number}.jpg" for number in range(given.images)]
                list(pool.map(paint, files, repeat(pixels), range(given.images)))
            found[size] = row = caption(folder, asked, given.parallel)
            print(f"{size}: {row['images_s']:.2f} images/s, {row['tokens_s']:.0f} tokens/s, bound by {row['bound_by']}")
            if given.json_out is not None:
                given.json_out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
