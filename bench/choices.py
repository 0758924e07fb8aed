"""Answers from a list beside free ones: how often they are right, how well their probabilities hold, what they cost.

    python bench/choices.py [--questions N] [--pairs N] [--model GGUF] [--to FILE]

Questions are held-out ones of the demo model's exam whose answer is one of a list. Each is asked four times at
temperature 0: free, with the list as choices (own words where they are needed, the default), with choices and never own
words (`--no-reasons`), and with choices and always own words (`--reasons`). The expected calibration error is that of
the likeliest label in ten bins of equal width (Guo et al., "On Calibration of Modern Neural Networks", 2017): the sum
over bins of their share of all questions × |share that is right - mean probability|.

The cost is the wall time of ten labels of four tokens by that of a free answer of 16 tokens, about images that were not
seen before, in turn. The labels are scored without own words: mostly they are none that the model would say, and own
words would be timed instead. Signs are drawn with matplotlib's fonts: pip install -e '.[training]'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # training is no part of the package

from PIL import Image
from training.exam import paper
from training.questions import NUMBERS, PLACES, ROW_PLACES, Question, judge
from training.scenes import COLOURS, SHAPES, SIZES, make_scene, render

from opsin import Opsin

BINS = 10
OUTRIGHT = ("colour", "shape", "size", "where", "place")
"""Kinds that the demo model answers with the label itself; of others it says first what they rest on."""
WAYS = {"choices": None, "no_reasons": False, "reasons": True}
THINGS = [f"a {size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES]
LABELS: dict[str, list[str]] = {
    "colour": list(COLOURS),
    "shape": [f"{'an' if shape[0] in 'aeiou' else 'a'} {shape}" for shape in SHAPES],
    "size": list(SIZES),
    "where": [*dict.fromkeys((*PLACES, *ROW_PLACES.values()))],
    "place": [*THINGS, "nothing"],
    **{kind: list(NUMBERS) for kind in ("count", "count_colour", "count_shape")},
    **{kind: ["yes", "no"] for kind in ("is_thing", "is_shape", "is_colour", "relation")},
}


def right_label(question: Question) -> str | None:
    """The label that is right; None where no label is."""
    labels = LABELS.get(question.kind, [])
    return next((one for one in labels if question.answer.removesuffix(".").endswith(one)), None)


def questions(count: int) -> Iterator[tuple[Image.Image, Question, str]]:
    """Held-out questions, about four a scene, with their pictures and right labels."""
    found, at, picture = 0, -1, None
    for index, scene, question in paper("heldout", count, closed=4):
        label = right_label(question)
        if label is None:
            continue
        if index != at or picture is None:
            at, picture = index, render(scene, 448)
        yield picture, question, label
        found += 1
        if found == count:
            return


def calibration_error(scored: list[tuple[float, bool]]) -> float:
    """See the module; `scored` are the likeliest label's probability, and whether it is right."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for probability, right in scored:
        bins.setdefault(min(BINS - 1, int(probability * BINS)), []).append((probability, right))
    gaps = (abs(sum(right for _, right in some) - sum(p for p, _ in some)) for some in bins.values())
    return sum(gaps) / len(scored)


def exam(model: Opsin, count: int) -> dict[str, Any]:
    """All four ways, by kind."""
    free: dict[str, list[bool]] = {}
    ways: dict[str, dict[str, list[tuple[float, bool]]]] = {way: {} for way in WAYS}
    for picture, question, label in questions(count):
        answer = model.ask(picture, question.text, temperature=0)
        free.setdefault(question.kind, []).append(judge(question, answer.text))
        for way, scored in ways.items():
            asked = {"choices": LABELS[question.kind], "reasons": WAYS[way], "temperature": 0}
            choice = model.ask(picture, question.text, **asked).choice
            assert choice is not None
            result = (choice.probabilities[choice.label], choice.label == label)
            scored.setdefault(question.kind, []).append(result)

    def summed(kinds: list[str]) -> dict[str, Any]:
        goods = [good for kind in kinds for good in free[kind]]
        row: dict[str, Any] = {"asked": len(goods), "free": round(sum(goods) / len(goods), 4)}
        for way, scored in ways.items():
            some = [one for kind in kinds for one in scored[kind]]
            row[way] = {
                "right": round(sum(right for _, right in some) / len(some), 4),
                "expected_calibration_error": round(calibration_error(some), 4),
            }
        return row

    outright = [kind for kind in OUTRIGHT if kind in free]
    return {
        "all": summed(list(free)),
        "answered outright": summed(outright),
        "reasons first": summed([kind for kind in free if kind not in outright]),
        "kinds": {kind: summed([kind]) for kind in sorted(free)},
    }


def cost(model: Opsin, pairs: int) -> dict[str, Any]:
    """Milliseconds of both, in turn."""
    ten = THINGS[::10][:10]
    times: dict[str, list[float]] = {"free": [], "choices": []}
    ways: dict[str, dict[str, Any]] = {
        "free": {"max_tokens": 16, "ignore_eos": True, "guard": False, "temperature": 0},
        "choices": {"choices": ten, "reasons": False},
    }
    for number in range(-2, pairs):  # the first two warm up
        for turn, way in enumerate(sorted(ways, reverse=number % 2 == 0)):
            picture = render(make_scene("heldout", 10_000 + 2 * number + turn), 448)
            began = time.perf_counter()
            model.ask(picture, "What is at the top left?", **ways[way])
            if number >= 0:
                times[way].append((time.perf_counter() - began) * 1e3)
    ratios = [scored / free for scored, free in zip(times["choices"], times["free"], strict=True)]
    medians = {f"{way}_ms": round(statistics.median(some), 2) for way, some in times.items()}
    return {"labels": ten, "pairs": pairs, **medians, "ratio": round(statistics.median(ratios), 3)}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    with Opsin(args.model, config=False, disk_cache=False) as model:
        figures = {"cost": cost(model, args.pairs), "exam": exam(model, args.questions)}
    text = json.dumps(figures, indent=1)
    print(text)
    if args.to is not None:
        args.to.write_text(text + "\n")


if __name__ == "__main__":
    main()
