"""Answers from a list: which labels a request allows, and how likely the model finds each of them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_CHOICES, MAX_LABEL_CHARS = 256, 200
Value = str | int | bool
"""What a label stands for: its text, a number of a scale, or True and False."""
BOOLEAN = {"yes": True, "no": False}
_SCALE = re.compile(r"\s*(-?\d{1,9})\s*(?:-|\.\.|to)\s*(-?\d{1,9})\s*")


@dataclass(frozen=True, slots=True)
class Choice:
    """How likely a model finds each label that it may answer with.

    `value` is what the likeliest label stands for. `probabilities`, by label, add up to 1; `margin` is how far the
    first is ahead of the second. `coverage` is how likely an answer without choices begins with any of the labels.
    `expected` is the mean of a scale, each number weighted with its probability (None: no scale).
    """

    label: str
    value: Value
    probabilities: dict[str, float]
    margin: float
    coverage: float
    expected: float | None = None


CHOICE_FIELDS = ("value", "probabilities", "margin", "coverage", "expected")


def choice_fields(choice: Choice | None) -> dict[str, Any]:
    """What rows and responses show of a choice; nothing of an answer without one."""
    shown = {} if choice is None else {name: getattr(choice, name) for name in CHOICE_FIELDS}
    return {name: value for name, value in shown.items() if value is not None}


def scale_labels(scale: str) -> dict[str, Value]:
    """The numbers of a scale such as "1-5", by their text. Raises ValueError."""
    found = _SCALE.fullmatch(scale)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not first < last < first + MAX_CHOICES:
        raise ValueError(f"a scale goes from one whole number to a larger one, as 1-5, over {MAX_CHOICES} at most")
    return {str(number): number for number in range(first, last + 1)}


def choose(scores: Mapping[str, float], values: Mapping[str, Value]) -> Choice:
    """The choice among labels with these natural log probabilities, of which at least one is finite.

    P(label) = exp(score) / Σ exp(score of each label); the first of equal ones is chosen.
    """
    peak = max(scores.values())
    weights = {label: math.exp(score - peak) for label, score in scores.items()}
    total = math.fsum(weights.values())
    probabilities = {label: weight / total for label, weight in weights.items()}
    label = max(scores, key=lambda one: scores[one])
    _, second = [*sorted(probabilities.values(), reverse=True), 0.0][:2]
    numbers = [value for value in values.values() if isinstance(value, int) and not isinstance(value, bool)]
    return Choice(
        label,
        values[label],
        probabilities,
        probabilities[label] - second,
        min(1.0, total * math.exp(peak)),
        sum(int(values[one]) * p for one, p in probabilities.items()) if numbers else None,
    )
