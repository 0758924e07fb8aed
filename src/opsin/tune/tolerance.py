"""Do settings change what is answered? Embeddings compared row by row, answers token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opsin.core.answer import TokenLogprob
from opsin.core.backend import Embedding
from opsin.core.layout import ImageRun
from opsin.core.sampling import SamplingParams
from opsin.tune.rig import Rig, asked, laid_out

LEAST_COSINE = 0.999
"""Of a picture's rows, on average; no single row may be under `LEAST_ROW`."""
LEAST_ROW = 0.99
MOST_LOGPROB = 0.05
"""Natural logarithm: what a token's probability may change by is 5 %."""
PICTURES = 3
TOKENS = 12
_QUESTIONS = ("what is this?", "what colours are there?", "how many things are there?")


@dataclass(frozen=True, slots=True)
class Closeness:
    """The worst of several pictures. `max_abs` is the largest difference over the largest value."""

    cosine: float
    row_cosine: float
    max_abs: float

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.5f} (worst row {self.row_cosine:.5f}), "
            f"largest difference {self.max_abs:.2%} of the largest value"
        )

    @property
    def fails(self) -> bool:
        """Whether it is beyond tolerance."""
        return not (self.cosine >= LEAST_COSINE and self.row_cosine >= LEAST_ROW)


@dataclass(frozen=True, slots=True)
class Reference:
    """What the untuned settings make of the pictures: embeddings, and greedy answers with likely tokens."""

    embeddings: tuple[Embedding, ...]
    answers: tuple[tuple[TokenLogprob, ...], ...]


def reference(rig: Rig) -> Reference:
    """Encode and answer `PICTURES` pictures. Raises EngineError."""
    return Reference(tuple(_embedding(rig, n) for n in range(1, PICTURES + 1)), _answers(rig))


def _embedding(rig: Rig, number: int) -> Embedding:
    with laid_out(rig, number) as layout:
        runs = [run for run in layout.runs if isinstance(run, ImageRun)]
        return rig.engine.call(lambda backend: np.concatenate([backend.encode(run) for run in runs]))


def _answers(rig: Rig) -> tuple[tuple[TokenLogprob, ...], ...]:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, guard=False, logprobs=10)
    return tuple(asked(rig, n + 1, _QUESTIONS[n % len(_QUESTIONS)], params).logprobs for n in range(PICTURES))


def closeness(before: tuple[Embedding, ...], after: tuple[Embedding, ...]) -> Closeness:
    """How near embeddings (float32 [n_tokens, n_embd], one a picture) came out. Pictures must have equal sizes."""
    found = []
    for a, b in zip(before, after, strict=True):
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        norms = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
        cosines = (a64 * b64).sum(axis=1) / np.maximum(norms, 1e-30)
        apart = float(np.abs(a64 - b64).max() / max(1e-30, float(np.abs(a64).max())))
        found.append((float(cosines.mean()), float(cosines.min()), apart))
    means, rows, aparts = zip(*found, strict=True)
    return Closeness(min(means), min(rows), max(aparts))


def drift(before: tuple[TokenLogprob, ...], after: tuple[TokenLogprob, ...]) -> float:
    """The most that the log probability of an answered token changed, in nats, as far as both answers are alike.

    Where they part, the token that was taken there must have been as likely before, or nearly: how much less likely
    it was counts, too. A token that was not even among the likely ones counts as infinitely far.
    """
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.token != new.token:
            known = {token: logprob for token, _, logprob in old.top}
            return max(worst, old.logprob - known.get(new.token, float("-inf")))
        worst = max(worst, abs(old.logprob - new.logprob))
    return worst


def judge(before: Reference, rig: Rig, *, encoder: bool) -> tuple[str | None, str]:
    """Why these settings change answers too much (None: they do not), and what was measured.

    With `encoder` the embeddings are compared as well. Raises EngineError.
    """
    measured = []
    if encoder:
        near = closeness(before.embeddings, tuple(_embedding(rig, n) for n in range(1, PICTURES + 1)))
        measured.append(str(near))
        if near.fails:
            return f"embeddings are too far from the untuned ones: {near}", str(near)
    far = max(map(drift, before.answers, _answers(rig)))
    measured.append(f"log probabilities of {PICTURES} answers moved by at most {far:.3f}")
    told = "; ".join(measured)
    return (f"{measured[-1]}, and {MOST_LOGPROB} is allowed" if far > MOST_LOGPROB else None), told
