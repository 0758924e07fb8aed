"""A repetition that the prompt asks for, with a number, is no runaway until it goes far beyond that."""

from __future__ import annotations

import pytest
from pieces import pieces

from opsin.engine.guard import Guard


def stopped_at(prompt: str, answer: str) -> int | None:
    guard = Guard(prompt)
    for token, text in pieces(answer):
        verdict = guard.feed(token, text)
        if verdict is not None:
            return verdict.at_token
    return None


@pytest.mark.parametrize(
    ("prompt", "unit"),
    [
        ("Repeat the word hello 200 times.", "hello "),
        ("Repeat the word hello 200 times.", "Hello, "),
        ("Repeat the word hello 200 times.", "hello\n"),
        ('Write "good morning" 300 times, please.', "Good morning! "),
        ("Schreibe 250-mal: Ich soll nicht schwätzen.", "Ich soll nicht schwätzen.\n"),
    ],
)
def test_as_many_copies_as_asked_for_are_left_alone_and_many_more_are_not(prompt: str, unit: str) -> None:
    asked = next(int(word.split("-")[0]) for word in prompt.split() if word[0].isdigit())
    assert stopped_at(prompt, unit * asked) is None
    assert stopped_at(prompt, unit * (3 * asked)) is not None


@pytest.mark.parametrize(
    ("prompt", "unit"),
    [
        ("Describe the image in 200 words.", "A cat sits on a mat. "),
        ("What is in the image?", "What is in the image? "),
        ("Repeat the word hello 200 times.", "world "),
    ],
)
def test_what_was_not_asked_for_ends_as_ever(prompt: str, unit: str) -> None:
    assert stopped_at(prompt, unit * 400) == stopped_at("", unit * 400) is not None
