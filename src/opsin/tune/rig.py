"""A loaded pair as tuning sees it, and what it costs, measured in pieces: encode, prefill, decode alone and of many."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from opsin.bench.batched import measure_batched
from opsin.bench.pictures import picture_file
from opsin.core.answer import Answer
from opsin.core.backend import Backend
from opsin.core.errors import BadParameter, EngineError
from opsin.core.layout import ImageRun, Layout
from opsin.core.picture import Picture
from opsin.core.sampling import SamplingParams
from opsin.core.settings import EngineSettings, MediaSettings
from opsin.engine import Engine
from opsin.media import load_picture
from opsin.prompt import Message, PromptBuilder
from opsin.tune.search import Cost, Part

TOKENS = 32
"""Tokens of the answer that costs are given for, as in the workloads of `opsin bench`."""
_STEPS = 16
_BATCH_TOKENS = 40
_SEEDS = 7_000_000  # pictures that no workload has


class Rig(Protocol):
    """An engine, what writes its prompts, and its backend, which may be used while the engine is idle.

    `threads` are those in force for decode, prefill and encode.
    """

    @property
    def engine(self) -> Engine:
        """The running engine."""
        ...

    @property
    def prompts(self) -> PromptBuilder:
        """Writes prompts for the model."""
        ...

    @property
    def backend(self) -> Backend:
        """The engine's backend."""
        ...

    @property
    def threads(self) -> tuple[int, int, int]:
        """Threads of decode, prefill and encode."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


OpenRig = Callable[[EngineSettings], Rig]


def picture(number: int) -> Picture:
    """The picture of that number, drawn."""
    return load_picture(picture_file(_SEEDS + number), MediaSettings())


@contextmanager
def laid_out(rig: Rig, number: int) -> Generator[Layout, None, None]:
    """A question about a picture as the model gets it. Raises BadParameter for a model without an encoder."""
    prompt = rig.prompts.build([Message("user", [picture(number), "what is this?"])])
    layout = rig.backend.layout(prompt.parts, add_bos=prompt.add_bos)
    try:
        if not any(isinstance(run, ImageRun) for run in layout.runs):
            raise BadParameter("This model reads no pictures: give its projector with --mmproj.")
        yield layout
    finally:
        layout.close()


def encode_seconds(rig: Rig, number: int = 0) -> float:
    """Seconds that the encoder takes for all chunks of a picture."""
    with laid_out(rig, number) as layout:
        began = time.perf_counter()
        for run in layout.runs:
            if isinstance(run, ImageRun):
                rig.backend.encode(run)
        return time.perf_counter() - began


def asked(rig: Rig, number: int, question: str, params: SamplingParams, before: str = "") -> Answer:
    """The whole answer to a question about a picture, with `before` in front of the picture."""
    content: list[str | Picture] = [*filter(None, [before]), picture(number), question]
    return rig.engine.submit(rig.prompts.build([Message("user", content)]), params).result()


@dataclass(frozen=True, slots=True)
class Pieces:
    """Seconds: encode and prefill of one question, a decode step alone, and a token of a full batch."""

    encode: float
    prefill: float
    step: float
    batched: float

    @property
    def cost(self) -> Cost:
        """What the pieces make together."""
        before = self.encode + self.prefill
        return Cost(before + TOKENS * self.step, before + TOKENS * self.batched)


class RigTrial:
    """Measures the part of the work that is being tuned; the other part is taken from `known`."""

    def __init__(self, rig: Rig, part: Part, sequences: int, known: Pieces | None = None) -> None:
        self._rig = rig
        self._part = part
        self._sequences = sequences
        self._known = known
        self._asked = 0
        self._warm()

    def _warm(self) -> None:
        if self._part == "encode":
            encode_seconds(self._rig)
        else:
            # The picture is encoded here, and known from then on.
            asked(self._rig, 0, "what is this?", SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))

    def run(self) -> Cost:
        """Measure once."""
        known = self._known
        if self._part == "encode":
            encode = encode_seconds(self._rig)
            rest = known or Pieces(0.0, 0.0, 0.0, 0.0)
            return Pieces(encode, rest.prefill, rest.step, rest.batched).cost
        return self.language(0.0 if known is None else known.encode).cost

    def language(self, encode: float) -> Pieces:
        """Prefill and decode, with an encode that took so long. Raises EngineError."""
        self._asked += 1
        # A text in front that no other question has, so that the picture is prefilled again.
        params = SamplingParams(temperature=0, max_tokens=_STEPS + 1, ignore_eos=True, guard=False)
        stages = asked(self._rig, 0, "what is this?", params, f"{self._asked}.").stages
        full = measure_batched(self._rig.engine, self._rig.prompts, sequences=self._sequences, tokens=_BATCH_TOKENS)
        if full.void is not None:
            raise EngineError(f"A full batch could not be measured, since {full.void}: tune with a smaller --parallel.")
        return Pieces(
            encode=encode,
            prefill=(stages.image_prefill_ms + stages.text_prefill_ms) / 1e3,
            step=(stages.decode_ms + stages.sample_ms + stages.detokenize_ms) / 1e3 / _STEPS,
            batched=1.0 / full.tokens_s,
        )

    def close(self) -> None:
        """Free the rig."""
        self._rig.close()


def survey(rig: Rig, sequences: int, rounds: int = 3) -> tuple[Pieces, float]:
    """The untuned pieces (medians), and how far measurements of one thing differ on this machine, as a share."""
    encode_seconds(rig)
    encodes = [encode_seconds(rig) for _ in range(rounds)]
    trial = RigTrial(rig, "language", sequences)
    rows = [trial.language(encode) for encode in encodes]
    pieces = Pieces(*(median(getattr(row, name) for row in rows) for name in ("encode", "prefill", "step", "batched")))
    costs = [row.cost.latency for row in rows]
    return pieces, min(0.25, max(0.03, (max(costs) - min(costs)) / median(costs)))
