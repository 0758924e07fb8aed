"""A loaded pair as tuning sees it, and what it costs, measured in pieces: encode, prefill, decode alone and of many."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

from opsin.bench.batched import measure_batched
from opsin.bench.engine_driver import EngineDriver
from opsin.bench.pictures import picture_file
from opsin.core.answer import Answer
from opsin.core.backend import Backend, BackendLimits
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
_BATCH_TRIES = 3  # a busy machine begins sequences one after another, and small models are done by then
_SEEDS = 7_000_000  # pictures that no workload has
_ROOM = 256  # tokens of a prompt's text and of the answer
_CTX = 2048  # from so many a sequence the engine lays its memory out as with more


@dataclass(frozen=True, slots=True)
class Rig:
    """An engine, what writes its prompts, and its backend, which may be used while the engine is idle.

    `threads` are those in force for decode, prefill and encode; `close` frees everything.
    """

    engine: Engine
    prompts: PromptBuilder
    backend: Backend
    threads: tuple[int, int, int]
    close: Callable[[], None]

    @property
    def driver(self) -> EngineDriver:
        """Asks the engine."""
        return EngineDriver(self.engine, self.prompts)


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
        return rig.engine.call(lambda backend: _encode(backend, layout))


def _encode(backend: Backend, layout: Layout) -> float:
    # On the engine's thread, since each thread that computes has OpenMP threads of its own.
    began = time.perf_counter()
    for run in layout.runs:
        if isinstance(run, ImageRun):
            backend.encode(run)
    return time.perf_counter() - began


def asked(rig: Rig, number: int, question: str, params: SamplingParams, before: str = "") -> Answer:
    """The whole answer to a question about a picture, with `before` in front of the picture."""
    content: list[str | Picture] = [*filter(None, [before]), picture(number), question]
    return rig.engine.submit(rig.prompts.build([Message("user", content)]), params).result()


@dataclass(frozen=True, slots=True)
class Sized:
    """Settings to measure with, and what they gave: threads, the backend's limits, and the tokens of a picture."""

    settings: EngineSettings
    threads: tuple[int, int, int]
    limits: BackendLimits
    image_tokens: int


def sized(open_rig: OpenRig, settings: EngineSettings, *, gpus: bool) -> Sized:
    """Load the settings as they are used, and give them a context just large enough, so that two engines fit.

    On `gpus` the layers that went there are named: an engine that has less room fails instead of being slower. Raises
    BadParameter where less context would lay the memory out in another way, and what opening raises.
    """
    settings = settings.model_copy(update={"disk_cache": False})
    rig = open_rig(settings)
    try:
        limits = rig.backend.limits
        with laid_out(rig, 0) as layout:
            needed, tokens = layout.n_tokens + _ROOM, layout.n_image_tokens
        if gpus and settings.gpu_layers is None:
            layers = rig.engine.placement().layers_offloaded
            settings = settings.model_copy(update={"gpu_layers": layers + 1 if layers else 0})  # and the output layer
    finally:
        rig.close()
    if settings.ctx is None:
        settings = settings.model_copy(update={"ctx": max(_CTX, needed) * settings.parallel})
        if limits.shared and settings.parallel > 1:
            small = open_rig(settings)
            small.close()
            if not small.backend.limits.shared:
                raise BadParameter(
                    f"With the small context of a tuning the {settings.parallel} answers would have memories of their "
                    "own, and without --ctx they share one on this machine: give the --ctx that you will use."
                )
    return Sized(settings, rig.threads, limits, tokens)


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


@dataclass
class RigTrial:
    """Measures the part of the work that is being tuned; the other part is taken from `known`."""

    rig: Rig
    part: Part
    sequences: int
    known: Pieces = Pieces(0.0, 0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        self._asked = 0
        if self.part == "encode":
            encode_seconds(self.rig)
        else:
            # The picture is encoded here, and known from then on.
            asked(self.rig, 0, "what is this?", SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))

    def run(self) -> Cost:
        """Measure once."""
        if self.part == "encode":
            return replace(self.known, encode=encode_seconds(self.rig)).cost
        return self.language(self.known.encode).cost

    def language(self, encode: float) -> Pieces:
        """Prefill and decode, with an encode that took so long. Raises EngineError."""
        self._asked += 1
        # A text in front that no other question has, so that the picture is prefilled again.
        params = SamplingParams(temperature=0, max_tokens=_STEPS + 1, ignore_eos=True, guard=False)
        stages = asked(self.rig, 0, "what is this?", params, f"{self._asked}.").stages
        for _ in range(_BATCH_TRIES):
            full = measure_batched(self.rig.engine, self.rig.prompts, sequences=self.sequences, tokens=_BATCH_TOKENS)
            if full.void is None:
                break
        else:
            raise EngineError(f"A full batch could not be measured, since {full.void}: tune with a smaller --parallel.")
        return Pieces(
            encode=encode,
            prefill=(stages.image_prefill_ms + stages.text_prefill_ms) / 1e3,
            step=(stages.decode_ms + stages.sample_ms + stages.detokenize_ms) / 1e3 / _STEPS,
            batched=1.0 / full.tokens_s,
        )

    def close(self) -> None:
        """Free the rig."""
        self.rig.close()


def survey(rig: Rig, sequences: int, rounds: int = 3) -> tuple[Pieces, float]:
    """The untuned pieces (medians), and how far measurements of one thing differ on this machine, as a share."""
    encode_seconds(rig)
    encodes = [encode_seconds(rig) for _ in range(rounds)]
    trial = RigTrial(rig, "language", sequences)
    rows = [trial.language(encode) for encode in encodes]
    pieces = Pieces(*(median(getattr(row, name) for row in rows) for name in ("encode", "prefill", "step", "batched")))
    costs = [row.cost.latency for row in rows]
    return pieces, min(0.25, max(0.03, (max(costs) - min(costs)) / median(costs)))
