"""Carries plans out on a backend, and gives each stage its time. Decides nothing about order or ends.

A native stage ends after `synchronize`: on a GPU `decode` returns before the work is done, and without that the time
of prefill and decode would be found in whichever call reads the logits next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opsin.core.answer import Progress, TokenLogprob
from opsin.core.backend import Backend, EmbeddingRows, TokenRow
from opsin.core.errors import DecodeFailed
from opsin.core.layout import ImageRun
from opsin.core.sampling import SamplingParams
from opsin.core.stages import Stage
from opsin.engine.plan import Decode, Encode, PrefillImage, PrefillText, Step
from opsin.engine.sequence import Sequence


class Runner:
    """Owns the way to the backend; used by the engine's thread alone.

    `run` gives the sequences for which a token was drawn, with the token and its log probability.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def begin(self, sequence: Sequence) -> None:
        """An admitted sequence starts with an empty memory and its own sampler. Raises BadGrammar."""
        self._backend.kv_remove(sequence.seq_id, 0, -1)
        sequence.sampler = self._backend.sampler(self._params(sequence), sequence.request.seed)

    def end(self, sequence: Sequence) -> None:
        """Give back what an ended sequence holds, before its id goes to another."""
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None
        if sequence.seq_id >= 0:
            self._backend.kv_remove(sequence.seq_id, 0, -1)
        sequence.embedding = None
        sequence.layout.close()

    def run(self, step: Step) -> list[tuple[Sequence, int, TokenLogprob | None]]:
        """Carry one step out. Raises EncodeFailed or DecodeFailed."""
        if isinstance(step, Encode):
            return self._encode(step)
        if isinstance(step, PrefillText):
            return self._prefill_text(step)
        if isinstance(step, PrefillImage):
            return self._prefill_image(step)
        return self._decode(step)

    def piece(self, token: int) -> bytes:
        """The bytes of a token."""
        return self._backend.piece(token)

    def leave_reasoning(self, sequence: Sequence) -> None:
        """The answer begins: from here on the grammar holds."""
        params = sequence.request.params
        if sequence.sampler is not None and (params.grammar or params.json_schema):
            sequence.sampler.close()
            sequence.sampler = self._backend.sampler(params, sequence.request.seed)

    @staticmethod
    def _params(sequence: Sequence) -> SamplingParams:
        # A schema describes the answer, not the reasoning before it.
        params = sequence.request.params
        if not sequence.output.thinking:
            return params
        return params.model_copy(update={"json_schema": None, "grammar": None})

    def _encode(self, step: Encode) -> list[tuple[Sequence, int, TokenLogprob | None]]:
        sequence = step.sequence
        number = step.run.picture + 1
        sequence.stream.deliver(Progress(f"reading picture {number} of {len(sequence.layout.images)}"))
        with sequence.clock.stage(Stage.ENCODE):
            sequence.embedding = self._backend.encode(step.run)
        return []

    def _prefill_text(self, step: PrefillText) -> list[tuple[Sequence, int, TokenLogprob | None]]:
        sequence = step.sequence
        last = len(step.tokens) - 1
        rows = [
            TokenRow(token, sequence.n_pos + sequence.run_offset + i, sequence.seq_id, logits=step.last and i == last)
            for i, token in enumerate(step.tokens)
        ]
        with sequence.clock.stage(Stage.TEXT_PREFILL):
            self._decode_rows(rows, [sequence])
        sequence.advance(len(rows))
        return [self._draw(sequence, last)] if step.last else []

    def _prefill_image(self, step: PrefillImage) -> list[tuple[Sequence, int, TokenLogprob | None]]:
        sequence = step.sequence
        assert sequence.embedding is not None, "a picture is encoded before it is prefilled"
        rows = EmbeddingRows(
            rows=sequence.embedding[step.start : step.stop],
            positions=_positions(step.run, sequence.n_pos, step.start, step.stop),
            seq_id=sequence.seq_id,
            logits=step.last,
            causal=step.run.causal,
        )
        with sequence.clock.stage(Stage.IMAGE_PREFILL):
            self._decode_rows(rows, [sequence])
        sequence.advance(step.stop - step.start)
        return [self._draw(sequence, step.stop - step.start - 1)] if step.last else []

    def _decode(self, step: Decode) -> list[tuple[Sequence, int, TokenLogprob | None]]:
        rows = [TokenRow(s.last_token, s.n_pos, s.seq_id, logits=True) for s in step.sequences]
        for sequence in step.sequences:
            sequence.clock.switch(Stage.DECODE)
        self._decode_rows(rows, list(step.sequences))
        for sequence in step.sequences:
            sequence.clock.switch(Stage.OTHER)
            sequence.n_pos += 1
            sequence.n_cells += 1
        return [self._draw(sequence, row) for row, sequence in enumerate(step.sequences)]

    def _decode_rows(self, rows: list[TokenRow] | EmbeddingRows, sequences: list[Sequence]) -> None:
        if not self._backend.decode(rows):
            held = sum(sequence.n_cells for sequence in sequences)
            raise DecodeFailed(
                f"The KV memory is full at {held} tokens: ask for a larger context (--ctx), or for shorter answers."
            )
        self._backend.synchronize()

    def _draw(self, sequence: Sequence, row: int) -> tuple[Sequence, int, TokenLogprob | None]:
        with sequence.clock.stage(Stage.SAMPLE):
            if sequence.forced:
                token = sequence.forced.pop(0)
            else:
                assert sequence.sampler is not None, "a running sequence has a sampler"
                token = sequence.sampler.sample(row)
            top = sequence.request.params.logprobs
            logprob = None if top is None else self._backend.logprobs(row, token, top)
        return sequence, token, logprob


def _positions(run: ImageRun, first: int, start: int, stop: int) -> NDArray[np.int32]:
    """Absolute positions of rows [start, stop): int32 [1, n], or [4, n] under M-RoPE."""
    if run.positions is None:
        return np.arange(first + start, first + stop, dtype=np.int32)[np.newaxis, :]
    return np.ascontiguousarray(run.positions[start:stop].T + np.int32(first))
