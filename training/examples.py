"""The example pictures that ship beside the demo model, with questions and expected answers.

All three are held-out scenes; `python -m training.examples` draws them again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

from training.questions import Question, ask
from training.scenes import make_scene, render

SIZE = 448
PICTURES = {"shapes.png": 163, "sign.png": 172, "number.png": 170}
KINDS = {
    "shapes.png": ("describe", "place", "where", "count", "is_thing", "relation", "size"),
    "sign.png": ("describe", "sign", "word", "shape", "is_shape"),
    "number.png": ("describe", "number", "colour", "count_colour"),
}


def _well_written(name: str, kind: str) -> Question:
    """The first question of this kind that starts with a capital and ends as a sentence does."""
    index = PICTURES[name]
    scene = make_scene("heldout", index)
    for attempt in itertools.count():
        question = ask(scene, kind, random.Random(1000 * index + attempt))
        if question and question.text[0].isupper() and question.text[-1] in "?.":
            return question
    raise AssertionError


def questions(name: str) -> list[Question]:
    """The questions about one of the pictures, always the same."""
    return [_well_written(name, kind) for kind in KINDS[name]]


def main() -> None:
    """Draw the pictures and write examples.json beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("src/opsin/models/demo"))
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, index in PICTURES.items():
        render(make_scene("heldout", index), SIZE).save(folder / name, optimize=True)
        entries += [{"picture": name, "question": q.text, "answer": q.answer} for q in questions(name)]
    (folder / "examples.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
