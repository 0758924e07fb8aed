"""The demo model through Opsin against llama.cpp's own C++ server: the same greedy answers."""

import json
import subprocess
import sys
from pathlib import Path

from opsin import Opsin
from opsin.models.resolve import demo_pair

REFERENCE = Path(__file__).parents[2] / "training" / "reference"
TOLERANCE = 0.05
"""Natural log probability: the server prefills in other batch shapes, which changes the rounding."""


def test_greedy_answers_agree_with_the_c_server() -> None:
    rows = json.loads((REFERENCE / "parity.json").read_text())["entries"]
    asked = [{"image": str(REFERENCE / row["image"]), "question": row["question"]} for row in rows]
    pair = demo_pair()
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("reference_server.py")), str(pair.llm), str(pair.mmproj)],
        input="\n".join(json.dumps(row) for row in asked),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    theirs = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    assert len(theirs) == len(asked) >= 100, child.stderr[-2000:]
    different = 0
    with Opsin() as model:
        for row, other in zip(asked, theirs, strict=True):
            mine = model.ask(row["image"], row["question"], temperature=0, guard=False, max_tokens=96, logprobs=2)
            if mine.text.strip() == other["text"].strip():
                continue
            different += 1
            pieces = [entry.piece.decode("utf-8", "replace") for entry in mine.logprobs]
            at = next(i for i, (a, b) in enumerate(zip([*pieces, ""], [*other["pieces"], ""], strict=False)) if a != b)
            (_, _, first), (_, _, second) = mine.logprobs[at].top
            assert first - second < TOLERANCE, f"{row}: {mine.text!r} and {other['text']!r} differ at a clear choice"
    print(f"parity with llama.cpp's server: {len(asked) - different} of {len(asked)} answers are the same")
