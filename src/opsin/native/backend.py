"""`core.backend.Backend` on llama.cpp: model, context and vision encoder behind one door."""

# ruff: noqa: D102 - the methods are described in `core.backend.Backend`
from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, cast

from opsin.core.errors import BadInput, BadParameter, DecodeFailed, EngineError, ModelNotFound, OpsinError
from opsin.core.model_info import ModelInfo
from opsin.core.prompt import TextPart
from opsin.native import logs
from opsin.native.constraint import Constraints
from opsin.native.context import Context, token_logprob
from opsin.native.devices import pause_threads
from opsin.native.model import Model
from opsin.native.sampler import NativeSampler
from opsin.native.tokenize import TextSpans, tokenize_prompt, tokenize_text
from opsin.native.vision import Encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from opsin.core.answer import TokenLogprob
    from opsin.core.backend import Embedding, EmbeddingRows, Sample, TokenBatch
    from opsin.core.placement import Placement
    from opsin.core.prompt import Part
    from opsin.core.sampling import SamplingParams
    from opsin.core.settings import EngineSettings
    from opsin.core.tokens import ImageChunk, TokenizedPrompt

_Sampled: TypeAlias = "tuple[int, TokenLogprob | None] | OpsinError"


class NativeBackend:
    """A loaded pair.

    `tokenize`, `check`, `piece` and the attributes may be used by any thread, all else by one at a time: a second one
    inside would corrupt native memory and is refused with an EngineError. `threads` are of decode, prefill and encode.
    """

    def __init__(self, settings: EngineSettings, model: Model, context: Context, encoder: Encoder | None) -> None:
        self.settings = settings
        self.model = self._model = model
        self._context = context
        self._encoder = encoder
        self._spans = TextSpans(model)
        self._constraints = Constraints(model)
        self._owner: int | None = None
        self._readers = 0
        self._gate = threading.Condition()
        decode, prefill = context.threads
        self.threads = (decode, prefill, prefill if encoder is None else encoder.threads)
        self.limits = replace(context.limits, encode_batch=1 if encoder is None else encoder.batch)
        self.has_vision = encoder is not None
        self.eog_tokens = model.eog_tokens
        self.eog_texts = frozenset(map(model.text_of, model.eog_tokens))
        self.info = ModelInfo(
            name=model.metadata.get("general.name") or model.path.stem,
            architecture=model.metadata.get("general.architecture", "unknown"),
            projector=(encoder.file.kind or "unknown") if encoder is not None else None,
            llm_file=model.path.name,
            mmproj_file=encoder.path.name if encoder is not None else None,
            quantisation=model.quantisation,
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the backend for this thread, which may come in again (a decode between two layers of an encode)."""
        with self._gate:
            before, me = self._owner, threading.get_ident()
            if before not in {None, me}:
                raise EngineError("Two threads use one backend at the same time: only the engine's thread may.")
            self._owner = me
        try:
            yield
        finally:
            self._owner = before

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Hold the model against `close` while another thread tokenizes."""
        with self._gate:
            self._readers += 1
        try:
            yield
        finally:
            with self._gate:
                self._readers -= 1
                self._gate.notify_all()

    def tokenize(
        self, parts: Sequence[Part], *, add_bos: bool, known: Callable[[str], bool] | None = None
    ) -> TokenizedPrompt:
        texts = [part for part in parts if isinstance(part, TextPart)]
        with self._reading():
            if len(texts) == len(parts):
                return tokenize_text(self._model, self._spans, texts, add_bos=add_bos)
            return tokenize_prompt(self._model, self._vision(), self._spans, parts, add_bos=add_bos, known=known)

    def encode(self, run: ImageChunk, between: Callable[[], None] | None = None) -> Embedding:
        with self._alone():
            return self._vision().encode(run, between)

    def encode_many(self, runs: Sequence[ImageChunk]) -> list[Embedding]:
        with self._alone():
            return self._vision().encode_many(runs)

    def _vision(self) -> Encoder:
        if self._encoder is None:
            raise BadInput("This model was loaded without a vision encoder: give its projector file with --mmproj.")
        return self._encoder

    def decode(self, rows: TokenBatch | EmbeddingRows) -> bool:
        with self._alone():
            return self._context.decode(rows)

    def synchronize(self) -> None:
        with self._alone():
            self._context.synchronize()

    def check(self, params: SamplingParams) -> None:
        """Compile a request's schema or grammar, which is then remembered. Raises BadGrammar. Any thread."""
        with self._reading():
            self._constraints.compile(params)

    def sampler(self, params: SamplingParams, seed: int) -> NativeSampler:
        with self._alone():
            return NativeSampler(self._model, self._context, params, seed, self._constraints.start(params))

    def sample(self, samples: Sequence[Sample]) -> list[_Sampled]:
        with self._alone():
            mine = cast("Sequence[tuple[NativeSampler, int, int | None]]", samples)
            greedy = [(row, sampler.forbidden) for sampler, row, top in mine if sampler.greedy and top is None]
            best = iter(self._context.argmax(greedy) if greedy else ())
            return [self._sample_one(*one, best) for one in mine]

    def _sample_one(
        self, sampler: NativeSampler, row: int, top: int | None, best: Iterator[int | DecodeFailed]
    ) -> _Sampled:
        try:
            if sampler.greedy and top is None:
                token = next(best)
                return token if isinstance(token, DecodeFailed) else (token, None)
            # Log probabilities are those of the model, before a sampler changes the logits.
            raw = None if top is None else self._context.logits(row).copy()
            token = sampler.sample(row)
        except OpsinError as error:
            return error
        return token, None if raw is None else token_logprob(raw, token, top or 0, self._model.piece)

    def logprobs(self, row: int, token: int, top: int) -> TokenLogprob:
        with self._alone():
            return token_logprob(self._context.logits(row), token, top, self._model.piece)

    def piece(self, token: int) -> bytes:
        return self._model.piece(token)

    def kv_remove(self, seq_id: int, start: int, end: int) -> bool:
        with self._alone():
            return self._context.kv_remove(seq_id, start, end)

    def kv_copy(self, source: int, target: int, start: int, end: int) -> None:
        with self._alone():
            self._context.kv_copy(source, target, start, end)

    def kv_last(self, seq_id: int) -> int:
        with self._alone():
            return self._context.kv_last(seq_id)

    def pause_threads(self) -> None:
        """Let the calling thread's team of OpenMP threads go; the next computation makes another in no time."""
        pause_threads(self._model.lib)

    def placement(self) -> Placement:
        """Run one encode and one prefill of their own with the probe on, and say where they ran."""
        from opsin.native.probe import probe_placement

        with self._alone():
            return probe_placement(self._model, self._encoder, self._spans, self.settings)

    def close(self) -> None:
        """Free everything, children first; twice does no harm. Waits for tokenized prompts that are being made."""
        with self._alone(), self._gate:
            self._gate.wait_for(lambda: self._readers == 0)
            self._constraints.close()
            self._model.close()


def open_backend(settings: EngineSettings) -> NativeBackend:
    """Load a pair, or free what was loaded of it and raise NativeMismatch, ModelError (of any kind) or BadParameter."""
    if settings.model is None:
        raise ModelNotFound("No model was given: name one with --model.")
    if settings.mmproj is None and (settings.image_max_tokens or settings.image_min_tokens):
        raise BadParameter("Limits on image tokens need a vision encoder: give its projector with --mmproj.")
    logs.show(settings.verbose)
    model = Model(settings.model, settings)
    try:
        encoder = Encoder(model, settings.mmproj, settings) if settings.mmproj is not None else None
        return NativeBackend(settings, model, Context(model, settings), encoder)
    except BaseException:
        model.close()
        raise
