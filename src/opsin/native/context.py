"""llama.cpp behind `core.backend.Backend`: the KV cache, ubatches on it, and what is sampled from their logits.

Many mistakes here are not errors in llama.cpp but the end of the process (an assertion in C). Each is checked before
the call, and raises instead.
"""

# ruff: noqa: D102 - the public methods are described in `core.backend.Backend`
import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opsin.core.answer import TokenLogprob
from opsin.core.backend import BackendLimits, Sample, Stopped
from opsin.core.errors import BadInput, DecodeFailed, ModelError, OpsinError
from opsin.core.image_options import ANY_SIZES
from opsin.core.request import (
    Embedding,
    EmbeddingRows,
    ImageChunk,
    Part,
    SamplingParams,
    TextPart,
    TokenBatch,
    TokenizedPrompt,
)
from opsin.core.settings import EngineSettings
from opsin.native import logs
from opsin.native.constraint import Constraint, Constraints
from opsin.native.context_plan import plan_context
from opsin.native.device_sampling import DeviceSampling
from opsin.native.model import Model, Owned, TokenTable, floats
from opsin.native.sampler import NOT_A_NUMBER, NativeSampler, log_norm, token_logprob
from opsin.native.stop import StopFlag
from opsin.native.vision import Encoder

_Sampled = tuple[int, TokenLogprob | None] | OpsinError

_READERS = 16  # threads that may tokenize at once
_TILE = 64  # rows that flash attention takes at once in ggml's CPU kernel; with fewer it is slower than without
_STOPPED = 2  # what `llama_decode` gives then
_PAUSE_SOFT = 1  # omp_pause_soft: what was set stays


class Context:
    """One llama_context over a model, with its vision encoder and constraints where it has them.

    `tokenize`, `check`, `piece` and the attributes may be used by any thread, all else by the one that owns the
    context.
    """

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        encoder: Encoder | None = None,
        *,
        callback: Any = None,
        ctx: int | None = None,
    ) -> None:
        self.model = model
        self._llama = llama = model.lib.llama
        self._encoder = encoder
        self._constraints: Constraints | None = None
        self._readers = threading.Semaphore(_READERS)  # held by who tokenizes or compiles, against `close`
        plan = plan_context(model, settings, ctx, parts=callback is None and (encoder is None or encoder.causal))
        params, unified, self._keeper, self._outputs_max = plan.params, plan.unified, plan.keeper, plan.outputs
        if callback is not None:
            params.cb_eval = callback
        mark = logs.SINK.mark
        pointer = llama.llama_init_from_model(model.pointer, params)
        logs.SINK.raise_interrupt()
        if not pointer:
            raise ModelError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens "
                f"({logs.SINK.cause(mark) or 'probably not enough memory'}): give a smaller --ctx or another --kv-type."
            )
        self.handle = Owned("context", pointer, llama.llama_free, model)
        sampling = settings.device_sampling
        self._device = DeviceSampling(llama, self.handle, params.n_seq_max, model.n_vocab) if sampling else None
        self.eog_tokens, self.piece = model.eog_tokens, model.piece
        self._table: TokenTable | None = None
        with suppress(LookupError):
            self._table = TokenTable(model)
        self.limits = BackendLimits(
            n_ctx=llama.llama_n_ctx(pointer),
            n_ubatch=(rows := llama.llama_n_batch(pointer)),
            n_seq_max=llama.llama_n_seq_max(pointer) - self._keeper,
            n_vocab=model.n_vocab,
            n_embd=model.n_embd,
            n_ctx_seq=min(room := llama.llama_n_ctx_seq(pointer), model.n_ctx_train or room),
            forks=not plan.whole,
            swaps=not plan.windows,  # llama.cpp saves no cells behind the window, which a shorter prefix would need
            tile=_TILE if model.device is None else 1,
            encode_batch=1 if encoder is None else encoder.batch,
            images=ANY_SIZES if encoder is None else encoder.sizes,
            n_outputs=self._outputs_max,
            asynchronous=model.offloaded,
            # Of a batch that was stopped llama.cpp forgets all from its first position on, in its first sequence: too
            # little where a keeper holds the same cells, too much where slices of an image share a position.
            stops=model.device is None and unified and not (plan.whole or plan.keeper or model.n_pos > 1),
            unified=unified,
            # Cells of several sequences are not free behind a window: they would fill a cache that has no more.
            branches=unified and not (plan.windows and plan.whole),
            # Flash attention in tiles would compute every row of a tile for the cells of all its sequences.
            mixed_rows=0 if self._table is None else rows if model.device else _TILE - 1,
        )
        most = self.limits.n_seq_max
        self._arrays = BatchArrays(llama.llama_batch, self.limits.n_ubatch, model.n_pos, self._keeper, most)
        self._causal = True
        self._stop, self._may_stop = StopFlag(llama, pointer), False
        self._outputs: dict[int, int] = {}  # rows of the last batch that have logits, and where these are

    @property
    def _memory(self) -> int:
        return int(self._llama.llama_get_memory(self.handle.pointer))

    def tokenize(
        self, parts: Sequence[Part], *, add_bos: bool, known: Callable[[str], bool] | None = None
    ) -> TokenizedPrompt:
        with self._readers:
            if all(isinstance(part, TextPart) for part in parts):
                return self.model.tokenize_parts(cast("Sequence[TextPart]", parts), add_bos=add_bos)
            if self._encoder is None:
                raise BadInput("This model was loaded without a vision encoder: give its projector file with --mmproj.")
            return self._encoder.tokenize(parts, add_bos=add_bos, known=known)

    def encode(self, chunk: ImageChunk, between: Callable[[], None] | None = None) -> Embedding:
        assert self._encoder is not None, "only an encoder makes image chunks"
        return self._encoder.encode(chunk, between)

    def encode_many(self, chunks: Sequence[ImageChunk]) -> list[Embedding]:
        assert self._encoder is not None, "only an encoder makes image chunks"
        return self._encoder.encode_many(chunks)

    def _batch(self, rows: TokenBatch | EmbeddingRows) -> tuple[Any, Sequence[int]]:
        """The native batch, checked, and which of its rows have logits."""
        if isinstance(rows, TokenBatch):
            self._check_tokens(rows)
            return self._arrays.tokens(rows), rows.outputs
        self._check_embeddings(rows)
        beside, data = rows.beside, rows.rows
        if beside.tokens or rows.behind:
            if self._table is None or not rows.causal:
                raise DecodeFailed("Tokens cannot go beside these rows of an image.")
            if beside.tokens:
                self._check_tokens(beside)
            data = np.concatenate([self._table.rows(beside.tokens), data, self._table.rows(rows.behind)])
            self._check_count(len(data))
        outputs = [*beside.outputs, len(data) - 1] if rows.logits else beside.outputs
        return self._arrays.embeddings(rows, data), outputs

    def decode(self, rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
        pointer, causal = self.handle.pointer, isinstance(rows, TokenBatch) or rows.causal
        batch, outputs = self._batch(rows)
        if causal != self._causal:
            self._llama.llama_set_causal_attn(pointer, causal)
            self._causal = causal
        if self.limits.stops and may_stop is not self._may_stop:
            self._stop.watch(may_stop)
            self._may_stop = may_stop
        if self._device is not None:
            self._device.prepare(one for one in self.handle.children if isinstance(one, NativeSampler))
        mark = logs.SINK.mark
        code = self._llama.llama_decode(pointer, batch)
        if code == 1:
            return False
        self._outputs = {}
        if code == _STOPPED:
            raise Stopped
        if code != 0:
            raise DecodeFailed(
                f"The language model failed on a batch (llama_decode returned {code}: {logs.SINK.cause(mark)}): "
                "ask again, and with --verbose for llama.cpp's own log if it comes back."
            )
        self._outputs = {row: index for index, row in enumerate(outputs)}
        return True

    def stop(self, on: bool) -> None:
        self._stop.text[0] = bytes([on])

    def _check_tokens(self, rows: TokenBatch) -> None:
        """What llama.cpp answers with an abort; unknown tokens, and positions with gaps, it refuses itself."""
        self._check_count(len(rows.tokens))
        _require(len(rows.outputs) <= self._outputs_max, f"More than {self._outputs_max} rows of a batch want logits.")
        self._check_sequences(min(rows.seq_ids), max(rows.seq_ids), *itertools.chain(*rows.shared.values()))

    def _check_embeddings(self, rows: EmbeddingRows) -> None:
        data, times, n_embd, n_pos = rows.rows, rows.positions[0], self.limits.n_embd, self.model.n_pos
        whole = ": this model reads an image whole, so give a smaller --image-max-tokens or a larger --ubatch"
        self._check_count(len(data), "" if rows.causal else whole)
        sound = data.shape[1:] == (n_embd,) and data.dtype == np.float32 and data.flags.c_contiguous
        _require(sound, f"Embedding rows must be contiguous float32 [n, {n_embd}].")
        _require(rows.positions.shape == (n_pos, len(data)), f"Positions must be [{n_pos}, {len(data)}].")
        self._check_sequences(rows.seq_id)
        # llama.cpp takes wrong positions of embeddings in silence.
        first = self.kv_last(rows.seq_id) + 1
        follows = times.min() >= first - 1  # under M-RoPE slices of an image may share a position
        if n_pos == 1:
            follows = np.array_equal(times, np.arange(first, first + len(data)))
        _require(follows and rows.positions.min() >= 0, f"The positions do not follow on {first - 1}.")

    def _check_count(self, count: int, advice: str = "") -> None:
        limit = self.limits.n_ubatch
        _require(0 < count <= limit, f"A batch of {count} rows does not fit the ubatch of {limit}{advice}.")

    def _check_sequences(self, *seq_ids: int) -> None:
        last = self.limits.n_seq_max - 1
        for seq_id in seq_ids:
            _require(0 <= seq_id <= last, f"There is no sequence {seq_id}: ids go from 0 to {last}.")

    def synchronize(self) -> None:
        self._llama.llama_synchronize(self.handle.pointer)

    def logits(self, row: int) -> NDArray[np.float32]:
        """The raw logits of a batch row of the last decode (-1: the last that has any), float32 [n_vocab].

        A view of native memory, good until the next decode. Raises DecodeFailed when the row has none.
        """
        pointer, outputs = self.handle.pointer, self._outputs
        _require(row in outputs or (row == -1 and bool(outputs)), f"Row {row} of the last batch has no logits.")
        device, size = self._device, self.limits.n_vocab
        view = floats(self._llama.llama_get_logits_ith(pointer, row), size) if device is None else device.logits(row)
        # One comparison instead of a scan: max() is not-a-number as soon as one logit is. Sorting such logits is
        # undefined in the native samplers.
        _require(not np.isnan(view.max()), NOT_A_NUMBER)
        return view

    def _argmax(self, wanted: Sequence[tuple[int, NDArray[np.intp]]]) -> list[_Sampled]:
        """The most likely token of each of these rows of the last decode, without the tokens forbidden there."""
        shape = (len(self._outputs), self.limits.n_vocab)
        logits = floats(self._llama.llama_get_logits(self.handle.pointer), shape[0] * shape[1]).reshape(shape)
        places = [self._outputs[row] for row, _ in wanted]
        for place, (_, forbidden) in zip(places, wanted, strict=True):
            if len(forbidden):
                logits[place, forbidden] = -np.inf
        few = 2 * len(places) <= len(logits)  # a look at some rows in vain costs less than a copy of most
        tokens = logits[places].argmax(axis=1) if few else logits.argmax(axis=1)[places]
        # argmax gives the first value that is not a number where there is one.
        bad = np.isnan(logits[places, tokens])
        return [
            DecodeFailed(NOT_A_NUMBER) if nan else (token, None)
            for nan, token in zip(bad, tokens.tolist(), strict=True)
        ]

    def check(self, params: SamplingParams) -> Constraint | None:
        if self._constraints is None or (params.json_schema is None and params.grammar is None):
            return None
        with self._readers:
            return self._constraints.compile(params)

    def sampler(self, params: SamplingParams, seed: int, compiled: object = None) -> NativeSampler:
        constraint = None if compiled is None else cast("Constraint", compiled).copy()
        return NativeSampler(self.model, self.handle, self.logits, params, seed, constraint=constraint)

    def sample(self, samples: Sequence[Sample]) -> list[_Sampled]:
        mine = cast("Sequence[tuple[NativeSampler, int, int | None]]", samples)
        if self._device is not None:
            return [self._sample_one(*one) for one in mine]
        greedy = [(row, sampler.forbidden) for sampler, row, top in mine if sampler.greedy and top is None]
        best = iter(self._argmax(greedy) if greedy else ())
        return [
            next(best) if sampler.greedy and top is None else self._sample_one(sampler, row, top)
            for sampler, row, top in mine
        ]

    def _sample_one(self, sampler: NativeSampler, row: int, top: int | None) -> _Sampled:
        try:
            # Log probabilities are those of the model, before a sampler changes the logits.
            raw = None if top is None else self.logits(row).copy()
            token = None if self._device is None else self._device.sample(sampler, row)
            token = sampler.sample(row) if token is None else token
        except OpsinError as error:
            return error
        found = None if raw is None else token_logprob(raw, token, top or 0, self.piece)
        if found is not None and sampler.permitted is not None:
            found = replace(found, permitted=sampler.permitted[0], overruled=sampler.permitted[1])
        return token, found

    def logprobs(self, row: int, token: int, top: int) -> TokenLogprob:
        return token_logprob(self.logits(row), token, top, self.piece)

    def score(self, row: int, tokens: Sequence[int]) -> list[float]:
        logits = self.logits(row)
        return (logits[np.array(tokens, np.intp)].astype(np.float64) - log_norm(logits)).tolist()

    def kv_last(self, seq_id: int) -> int:
        self._check_sequences(seq_id)
        return int(self._llama.llama_memory_seq_pos_max(self._memory, seq_id))

    def kv_remove(self, seq_id: int, start: int, end: int) -> bool:
        self._check_sequences(seq_id)
        return all(self._llama.llama_memory_seq_rm(self._memory, one, start, end) for one in self._ids(seq_id))

    def kv_copy(self, source: int, target: int, start: int, end: int) -> None:
        self._check_sequences(source, target)
        part = start > 0 or 0 <= end <= self.kv_last(source)
        refused = part and not (self.limits.forks and (start == 0 or self.limits.unified))
        _require(not refused, "A part of this model's state cannot be copied.")
        if source == target:
            return
        if not self.limits.unified:  # llama.cpp would copy a part with all its empty cells
            self.kv_load(target, self.kv_save(source))
            self.kv_remove(target, end if end >= 0 else self.limits.n_ctx, -1)
            return
        for one in self._ids(target):
            self._llama.llama_memory_seq_cp(self._memory, source, one, start, end)

    def kv_save(self, seq_id: int) -> NDArray[np.uint8]:
        self._check_sequences(seq_id)
        state = np.empty(self._llama.llama_state_seq_get_size(self.handle.pointer, seq_id), np.uint8)
        self._llama.llama_state_seq_get_data(self.handle.pointer, _bytes(state), len(state), seq_id)
        return state

    def kv_load(self, seq_id: int, saved: NDArray[np.uint8]) -> None:
        self._check_sequences(seq_id)
        mark = logs.SINK.mark
        if not self._llama.llama_state_seq_set_data(self.handle.pointer, _bytes(saved), len(saved), seq_id):
            raise DecodeFailed(f"The KV cache does not take back what was swapped out ({logs.SINK.cause(mark)}).")

    def _ids(self, seq_id: int) -> tuple[int, ...]:
        return (seq_id, seq_id + self._keeper) if self._keeper else (seq_id,)

    def pause_threads(self) -> None:
        # Each thread that computes has a team of OpenMP threads of its own, and libgomp stops spinning as soon as more
        # threads than cores belong to teams: a second engine in a process would make the first half as fast.
        if self.model.lib.pause is not None:
            self.model.lib.pause(_PAUSE_SOFT)

    def close(self) -> None:
        """Free everything, children first; twice does no harm. Waits for prompts that are being tokenized."""
        with ExitStack() as alone:
            for _ in range(_READERS):
                alone.enter_context(self._readers)
            if self._constraints is not None:
                self._constraints.close()
            self.model.close()


def _bytes(array: NDArray[np.uint8]) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_uint8))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DecodeFailed(otherwise)


class BatchArrays:
    """The arrays of one ubatch of `capacity` rows, made once: `llama_batch` is a struct of bare pointers into them.

    A row has `n_pos` positions: 1, or 4 under M-RoPE, section after section, for which `llama_batch_init` has no room.
    It belongs to its sequence, and with a `keeper` offset also to the sequence that many ids further on; a row of a
    label to as many as share it, `most` at most.
    """

    def __init__(self, batch_type: Any, capacity: int, n_pos: int, keeper: int = 0, most: int = 1) -> None:
        self._n_pos = n_pos
        # Added to a row's sequence: its ids. llama.cpp masks by any one of them: both hold the same cells.
        self._ids = np.array([0, keeper] if keeper else [0], np.int32)
        self._token, self._pos = np.zeros(capacity, np.int32), np.zeros(capacity * n_pos, np.int32)
        self._n_seq_id = np.full(capacity, len(self._ids), np.int32)
        self._seq_id = np.zeros((capacity, most * len(self._ids)), np.int32)
        self._logits = np.zeros(capacity, np.int8)
        # A row's list of ids is one row of _seq_id.
        self._rows = self._seq_id.ctypes.data + self._seq_id.strides[0] * np.arange(capacity, dtype=np.uintp)
        self._types = dict(batch_type._fields_)
        self._batch = batch_type()
        fields: Any = {"pos": self._pos, "n_seq_id": self._n_seq_id, "seq_id": self._rows, "logits": self._logits}
        for field, array in fields.items():
            setattr(self._batch, field, self._pointer(array, field))
        self._tokens = self._pointer(self._token, "token")
        self._data: Embedding

    def _pointer(self, array: np.ndarray[Any, Any], field: str) -> Any:
        # Not `data_as`: each call of it leaves a cycle for the garbage collector.
        return ctypes.cast(array.ctypes.data, self._types[field])

    def tokens(self, batch: TokenBatch) -> Any:
        """A `llama_batch` of tokens, valid until the next call."""
        count = len(batch.tokens)
        self._token[:count] = batch.tokens
        self._pos[:count] = batch.positions
        self._owners(batch, count)
        self._batch.n_tokens, self._batch.token, self._batch.embd = count, self._tokens, None
        return self._batch

    def embeddings(self, rows: EmbeddingRows, data: Embedding) -> Any:
        """A `llama_batch` of `data`: tokens beside, `rows`, tokens behind; valid until the next call."""
        count, tokens, end = len(data), len(rows.beside.tokens), len(data) - len(rows.behind)
        self._owners(rows.beside, count)
        positions = self._pos[: count * self._n_pos].reshape(self._n_pos, count)
        # A token's sections have one position, but the last of four, which is 0: as llama.cpp does it for tokens.
        positions[:, :tokens] = rows.beside.positions
        positions[:, tokens:end] = rows.positions
        positions[:, end:] = np.arange(rows.behind_at, rows.behind_at + count - end)
        positions[3:, :tokens] = positions[3:, end:] = 0
        self._seq_id[tokens:count, : len(self._ids)] = rows.seq_id + self._ids
        self._logits[count - 1] |= rows.logits
        self._data = data  # which the batch points into
        self._batch.n_tokens, self._batch.token, self._batch.embd = count, None, self._pointer(data, "embd")
        return self._batch

    def _owners(self, batch: TokenBatch, count: int) -> None:
        """The sequences of a batch's tokens, and which of `count` rows want logits."""
        width = len(self._ids)
        self._seq_id[: len(batch.tokens), :width] = np.array(batch.seq_ids, np.int32)[:, np.newaxis] + self._ids
        self._n_seq_id[:count] = width
        for row, others in batch.shared.items():
            ids = np.add.outer(others, self._ids).ravel()
            self._seq_id[row, width : width + len(ids)] = ids
            self._n_seq_id[row] += len(ids)
        self._logits[:count] = 0
        self._logits[batch.outputs] = 1
