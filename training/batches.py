"""Training rows for the text model: many questions packed behind each picture.

A row is a fixed number of tokens that follow the picture. Either it holds separate questions, each
a segment of its own whose positions start right after the picture, or it holds one conversation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from training.questions import BLIND, ask_any
from training.scenes import Scene, make_scene
from training.tokenizer import Tokenizer

LENGTH = 72
ROWS = 4
CONVERSATIONS = 0.2  # share of the rows
IMAGE_TOKENS = 36
BLIND_START = 2  # <s>, <|user|>
START = BLIND_START + IMAGE_TOKENS


@dataclass
class Rows:
    """[B, ROWS, LENGTH] arrays; target is -1 where nothing is learned."""

    scenes: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    blind: Rows | None = None  # a few rows without a picture


def _exchange(tokenizer: Tokenizer, scene: Scene, rng: random.Random, blind: bool) -> tuple[list[int], list[int]]:
    question = ask_any(scene, rng)
    answer = BLIND if blind and question.kind != "about" else question.answer
    return tokenizer.prompt(question.text), tokenizer.answer(answer)


def _fill_row(
    tokenizer: Tokenizer, scene: Scene, rng: random.Random, out: Rows, at_row: tuple[int, int],
    blind: bool,
) -> None:  # fmt: skip
    b, r = at_row
    start = BLIND_START if blind else START
    talk = rng.random() < CONVERSATIONS
    at, segment, position = 0, 0, start
    misses = 0
    while misses < 4:
        prompt, answer = _exchange(tokenizer, scene, rng, blind)
        if talk and at:
            prompt = [tokenizer.user, *prompt]
        size = len(prompt) + len(answer)
        if at + size > LENGTH:
            misses += 1
            continue
        if not talk:
            segment, position = segment + 1, start
        ids = prompt + answer
        out.tokens[b, r, at : at + size] = ids
        out.positions[b, r, at : at + size] = range(position, position + size)
        out.segments[b, r, at : at + size] = segment
        first = at + len(prompt) - 1  # the last prompt token foretells the answer's first
        out.targets[b, r, first : at + size - 1] = answer
        at, position = at + size, position + size
    out.segments[b, r, at:] = -1


def make_rows(tokenizer: Tokenizer, split: str, indices: np.ndarray, seed: int, blind: bool = False) -> Rows:
    """Rows for these scenes; `blind` ones have no picture before them and have to say so."""
    shape = (len(indices), ROWS, LENGTH)
    out = Rows(indices, np.zeros(shape, np.int16), np.full(shape, START, np.int16),
               np.zeros(shape, np.int16), np.full(shape, -1, np.int16))  # fmt: skip
    rng = random.Random(seed)
    for b, index in enumerate(indices):
        scene = make_scene(split, int(index))
        for r in range(ROWS):
            _fill_row(tokenizer, scene, rng, out, (b, r), blind)
    return out


def _job(job: tuple[int, int, int]) -> Rows:
    """One batch, decided by its seed alone."""
    seed, scenes, batch = job
    indices = np.sort(np.random.default_rng(seed).choice(scenes, batch, replace=False))
    rows = make_rows(_TOKENIZER, "train", indices, seed)
    rows.blind = make_rows(_TOKENIZER, "train", indices[:1], seed + 1, blind=True)
    return rows


_TOKENIZER = Tokenizer()


def stream(scenes: int, batch: int, first: int, last: int, seed: int) -> Iterator[Rows]:
    """Batches number `first` to `last`, made ahead by another process."""
    jobs = ((seed * 1_000_003 + step, scenes, batch) for step in range(first, last))
    with get_context("fork").Pool(1) as pool:
        ahead = []
        for job in jobs:
            ahead.append(pool.apply_async(_job, (job,)))
            if len(ahead) > 8:
                yield ahead.pop(0).get()
        for result in ahead:
            yield result.get()
