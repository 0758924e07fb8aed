"""Which questions an evaluation asks, and how its right and wrong answers are counted."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

from training.questions import CLOSED, Question, ask
from training.scenes import Scene, make_scene

DESCRIBE, DESCRIBE_SIGN = "describe", "describe_sign"


def label(question: Question, scene: Scene) -> str:
    """The heading a question is counted under; scenes with a sign are described apart."""
    if question.kind == DESCRIBE and scene.sign:
        return DESCRIBE_SIGN
    return question.kind


def questions_about(scene: Scene, seed: int, closed: int | None = None) -> list[Question]:
    """A full description and `closed` closed questions of different kinds (None: every kind)."""
    rng = random.Random(seed)
    kinds = list(CLOSED)
    rng.shuffle(kinds)
    described = ask(scene, DESCRIBE, rng)
    asked = [q for q in (ask(scene, kind, rng) for kind in kinds) if q]
    return ([described] if described else []) + asked[:closed]


def paper(split: str, scenes: int, seed: int = 7, closed: int | None = None) -> list[tuple[int, Scene, Question]]:
    """Every (scene number, scene, question) of an exam over the first scenes of a split."""
    out = []
    for index in range(scenes):
        scene = make_scene(split, index)
        out += [(index, scene, q) for q in questions_about(scene, seed * 1_000_003 + index, closed)]
    return out


def shares(results: Iterable[tuple[str, bool]]) -> dict[str, dict[str, float]]:
    """{heading: {asked, right, share}}, with all closed kinds and all descriptions together too."""
    goods: dict[str, list[bool]] = defaultdict(list)
    for kind, good in results:
        goods[kind].append(good)
        whole = "all descriptions" if kind.startswith(DESCRIBE) else "all closed"
        goods[whole].append(good)
    return {
        kind: {"asked": len(g), "right": sum(g), "share": round(sum(g) / len(g), 4)}
        for kind, g in sorted(goods.items())
    }
