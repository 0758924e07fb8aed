"""Ask Opsin itself about held-out scenes and write how often it was right.

`python -m training.evaluate` asks about 1,000 held-out scenes, 400 with an unseen colour-shape
pair or an unseen word, and the plain pictures of `training.plain`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from training.exam import label, paper, questions_about, shares
from training.plain import COUNT, plain
from training.questions import Question, judge
from training.scenes import Scene, render

Asked = tuple[Image.Image, Scene, Question]
PICTURE_SIZE = 448


def _drawn(split: str, scenes: int, closed: int) -> Iterable[Asked]:
    index, picture = -1, None
    for at, scene, question in paper(split, scenes, closed=closed):
        if at != index or picture is None:
            index, picture = at, render(scene, PICTURE_SIZE)
        yield picture, scene, question


def _plain(closed: int) -> Iterable[Asked]:
    for index in range(COUNT):
        picture, scene = plain(index)
        for question in questions_about(scene, index, closed):
            yield picture, scene, question


def _run(
    ask: Callable[[Image.Image, str], str], asked: Iterable[Asked], wrong: list[dict[str, str]]
) -> list[tuple[str, bool]]:
    results = []
    for picture, scene, question in asked:
        answer = ask(picture, question.text)
        good = judge(question, answer)
        results.append((label(question, scene), good))
        if not good and len(wrong) < 100:
            wrong.append({"scene": str(scene.seed), "question": question.text,
                          "answer": answer, "expected": question.answer})  # fmt: skip
    return results


def _unseen(asked: Iterable[Asked], words: bool) -> Iterable[Asked]:
    return (item for item in asked if (item[1].sign is not None) == words)


def evaluate(ask: Callable[[Image.Image, str], str], scenes: int, unseen: int, closed: int) -> dict[str, object]:
    """All four parts; `ask` answers one question about one picture."""
    parts: dict[str, Iterable[Asked]] = {
        "held-out scenes": _drawn("heldout", scenes, closed),
        "unseen colour-shape pairs": _unseen(_drawn("unseen", unseen, closed), words=False),
        "unseen words": _unseen(_drawn("unseen", unseen, closed), words=True),
        "plain pictures": _plain(closed),
    }
    out: dict[str, object] = {"scenes": scenes, "unseen scenes": unseen}
    for name, asked in parts.items():
        began, wrong = time.perf_counter(), []
        results = _run(ask, asked, wrong)
        out[name] = {
            "seconds": round(time.perf_counter() - began, 1),
            "kinds": shares(results),
            "wrong": wrong,
        }
        print(name, json.dumps(out[name]["kinds"], indent=1), flush=True)  # type: ignore[index]
    return out


def main() -> None:
    """Run the whole evaluation through Opsin and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--unseen", type=int, default=400)
    parser.add_argument("--closed", type=int, default=4, help="closed questions a scene")
    parser.add_argument("--to", type=Path, default=Path("training/results/demo_eval.json"))
    args = parser.parse_args()
    from opsin import Opsin  # here, so that `evaluate` can also judge another runtime's answers

    with Opsin() as opsin:
        figures = evaluate(
            lambda picture, text: opsin.ask(picture, text, temperature=0).text, args.scenes, args.unseen, args.closed
        )
    args.to.parent.mkdir(parents=True, exist_ok=True)
    args.to.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
