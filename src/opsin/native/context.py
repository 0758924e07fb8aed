"""The KV cache and the computing of ubatches on it.

Many mistakes here are not errors in llama.cpp but the end of the process (an assertion in C). Each is checked before
the call, and raises instead.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.core.answer import TokenLogprob
from opsin.core.backend import BackendLimits, EmbeddingRows
from opsin.core.errors import BadParameter, DecodeFailed, ModelError
from opsin.core.ggml_types import KV_TYPES
from opsin.core.settings import CTX_PER_SEQUENCE
from opsin.native import logs
from opsin.native.devices import default_threads
from opsin.native.ggml import floats
from opsin.native.handles import Owned

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from opsin.core.backend import TokenBatch
    from opsin.core.settings import EngineSettings
    from opsin.native.model import Model

_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
# With a unified cache a sequence id costs nothing, so idle prefixes get ids of their own beside the running answers.
_SPARE_SEQUENCES = 32
_MIN_OUTPUTS = 64  # rows of one ubatch that may have logits
_TILE = 64  # rows that flash attention takes at once in ggml's CPU kernel; with fewer it is slower than without

_NOT_A_NUMBER = (
    "The language model computed a value that is not a number: the model file may be damaged, so download it again."
)


class Context:
    """One llama_context: the KV cache that all sequences share. All of it belongs to one thread at a time."""

    def __init__(self, model: Model, settings: EngineSettings, *, callback: Any = None, ctx: int | None = None) -> None:
        self.llama = llama = model.lib.llama
        self._model = model
        params = llama.llama_context_default_params()
        trained = min(model.n_ctx_train or CTX_PER_SEQUENCE, CTX_PER_SEQUENCE)
        params.n_ctx = ctx or settings.ctx or trained * settings.parallel
        params.n_ubatch = params.n_batch = min(settings.ubatch, params.n_ctx)
        # Each sequence of a sliding-window model has a keeper that holds the same cells. llama.cpp takes a cell outside
        # the window of the only sequence that holds it as free, also with swa_full and while others are empty: a
        # prefix would lose its beginning. A cell of two sequences stays.
        slides = llama.llama_model_n_swa(model.pointer) > 0 and not model.whole_states_only
        sequences = _sequences(model, settings, params.n_ubatch, _MAX_SEQUENCES // (2 if slides else 1))
        self._keeper = sequences if slides else 0
        params.n_seq_max = sequences + self._keeper
        # Without it room is reserved for the logits of a whole ubatch: 0.6 GB with a vocabulary of 150,000.
        params.n_outputs_max = self._outputs_max = max(_MIN_OUTPUTS, params.n_seq_max)
        params.n_threads = settings.threads or default_threads(llama.llama_model_n_params(model.pointer))
        params.n_threads_batch = settings.threads_batch or params.n_threads
        params.type_k = params.type_v = KV_TYPES[settings.kv_type]
        params.flash_attn_type = -1 if settings.flash_attention is None else int(settings.flash_attention)
        params.kv_unified = True
        # Sliding-window layers keep everything, so that prefixes stay whole.
        params.swa_full = True
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
        self.handle = Owned("context", pointer, llama.llama_free, model.handle)
        self.threads: tuple[int, int] = params.n_threads, params.n_threads_batch  # of decode and of prefill
        self.limits = BackendLimits(
            n_ctx=llama.llama_n_ctx(pointer),
            n_batch=llama.llama_n_batch(pointer),
            n_ubatch=llama.llama_n_ubatch(pointer),
            n_seq_max=llama.llama_n_seq_max(pointer) - self._keeper,
            n_vocab=model.n_vocab,
            n_embd=model.n_embd,
            n_ctx_train=model.n_ctx_train,
            forks=not model.whole_states_only,
            tile=_TILE if model.device is None else 1,
        )
        self._arrays = BatchArrays(llama.llama_batch, self.limits.n_ubatch, model.n_pos, self._keeper)
        self._causal = True
        self._outputs: dict[int, int] = {}  # rows of the last batch that have logits, and where these are

    @property
    def pointer(self) -> int:
        """The native context."""
        return self.handle.pointer

    @property
    def _memory(self) -> int:
        return int(self.llama.llama_get_memory(self.pointer))

    def decode(self, rows: TokenBatch | EmbeddingRows) -> bool:
        """Run one ubatch. False when the KV cache has no room, and nothing changed. Raises DecodeFailed."""
        pointer, causal = self.pointer, True
        if isinstance(rows, EmbeddingRows):
            self._check_embeddings(rows)
            batch, causal = self._arrays.embeddings(rows), rows.causal
            outputs = [len(rows.rows) - 1] if rows.logits else []
        else:
            self._check_tokens(rows)
            batch, outputs = self._arrays.tokens(rows), rows.outputs
        if causal != self._causal:
            self.llama.llama_set_causal_attn(pointer, causal)
            self._causal = causal
        mark = logs.SINK.mark
        code = self.llama.llama_decode(pointer, batch)
        if code == 1:
            return False
        self._outputs = {}
        if code != 0:
            raise DecodeFailed(
                f"The language model failed on a batch (llama_decode returned {code}: {logs.SINK.cause(mark)}): "
                "ask again, and with --verbose for llama.cpp's own log if it comes back."
            )
        self._outputs = {row: index for index, row in enumerate(outputs)}
        return True

    def _check_tokens(self, rows: TokenBatch) -> None:
        """What llama.cpp answers with an abort; positions that do not follow each other it refuses itself."""
        self._check_count(len(rows.tokens))
        known = min(rows.tokens) >= 0 and max(rows.tokens) < self.limits.n_vocab
        _require(known, f"A token is not in the vocabulary of {self.limits.n_vocab}.")
        _require(len(rows.outputs) <= self._outputs_max, f"More than {self._outputs_max} rows of a batch want logits.")
        self._check_sequences(min(rows.seq_ids), max(rows.seq_ids))

    def _check_embeddings(self, rows: EmbeddingRows) -> None:
        data, times, n_embd, n_pos = rows.rows, rows.positions[0], self.limits.n_embd, self._model.n_pos
        whole = ": this model reads an image whole, so give a smaller --image-max-tokens or a larger --ubatch"
        self._check_count(len(data), "" if rows.causal else whole)
        sound = data.shape[1:] == (n_embd,) and data.dtype == np.float32 and data.flags.c_contiguous
        _require(sound, f"Embedding rows must be contiguous float32 [n, {n_embd}].")
        _require(rows.positions.shape == (n_pos, len(data)), f"Positions must be [{n_pos}, {len(data)}].")
        self._check_sequences(rows.seq_id)
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
        """Wait until all that was started is done."""
        self.llama.llama_synchronize(self.pointer)

    def logits(self, row: int) -> NDArray[np.float32]:
        """The raw logits of a batch row of the last decode (-1: the last that has any), float32 [n_vocab].

        A view of native memory, good until the next decode. Raises DecodeFailed when the row has none.
        """
        pointer = self.pointer
        held = row in self._outputs or (row == -1 and bool(self._outputs))
        _require(held, f"Row {row} of the last batch has no logits.")
        view = floats(self.llama.llama_get_logits_ith(pointer, row), self.limits.n_vocab)
        # One comparison instead of a scan: max() is not-a-number as soon as one logit is. Sorting such logits is
        # undefined in the native samplers.
        _require(not np.isnan(view.max()), _NOT_A_NUMBER)
        return view

    def argmax(self, wanted: Sequence[tuple[int, NDArray[np.intp] | None]]) -> list[int | DecodeFailed]:
        """The most likely token of each of these rows of the last decode, without the tokens forbidden there."""
        shape = (len(self._outputs), self.limits.n_vocab)
        logits = floats(self.llama.llama_get_logits(self.pointer), shape[0] * shape[1]).reshape(shape)
        places = [self._outputs[row] for row, _ in wanted]
        for place, (_, forbidden) in zip(places, wanted, strict=True):
            if forbidden is not None:
                logits[place, forbidden] = -np.inf
        few = 2 * len(places) <= len(logits)  # a look at some rows in vain costs less than a copy of most
        tokens = logits[places].argmax(axis=1) if few else logits.argmax(axis=1)[places]
        # argmax gives the first value that is not a number where there is one.
        bad = np.isnan(logits[places, tokens])
        return [DecodeFailed(_NOT_A_NUMBER) if nan else token for nan, token in zip(bad, tokens.tolist(), strict=True)]

    def at(self, row: int) -> tuple[int, int]:
        """The native context that holds the logits of a batch row of the last decode, and which row they are there."""
        return self.pointer, row

    def kv_last(self, seq_id: int) -> int:
        """The last position held for a sequence, -1 when there is none."""
        self._check_sequences(seq_id)
        return int(self.llama.llama_memory_seq_pos_max(self._memory, seq_id))

    def kv_remove(self, seq_id: int, start: int, end: int) -> bool:
        """Forget positions [start, end); False when this memory cannot forget a part."""
        self._check_sequences(seq_id)
        if self._keeper:
            self.llama.llama_memory_seq_rm(self._memory, seq_id + self._keeper, start, end)
        return bool(self.llama.llama_memory_seq_rm(self._memory, seq_id, start, end))

    def kv_copy(self, source: int, target: int, start: int, end: int) -> None:
        """Let `target` share positions [start, end) of `source`. Raises DecodeFailed for a part of a state."""
        self._check_sequences(source, target)
        part = start > 0 or 0 <= end <= self.kv_last(source)
        _require(not (part and self._model.whole_states_only), "A part of this model's state cannot be copied.")
        if source == target:
            return
        self.llama.llama_memory_seq_cp(self._memory, source, target, start, end)
        if self._keeper:
            self.llama.llama_memory_seq_cp(self._memory, source, target + self._keeper, start, end)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DecodeFailed(otherwise)


def _sequences(model: Model, settings: EngineSettings, n_ubatch: int, most: int) -> int:
    """Sequence ids to ask for. A decode step of all of them must fit a ubatch, else llama.cpp aborts."""
    if settings.parallel > n_ubatch:
        raise BadParameter(
            f"{settings.parallel} answers at a time do not fit a ubatch of {n_ubatch}: "
            "give a smaller --parallel or a larger --ctx."
        )
    # A recurrent model keeps a whole state for each id: none to spare there.
    spare = 0 if model.whole_states_only else _SPARE_SEQUENCES
    return min(settings.parallel + spare, most, n_ubatch)


class BatchArrays:
    """The arrays of one ubatch of `capacity` rows, made once: `llama_batch` is a struct of bare pointers into them.

    A row has `n_pos` positions: 1, or 4 under M-RoPE, section after section, for which `llama_batch_init` has no room.
    It belongs to its sequence, and with a `keeper` offset also to the sequence that many ids further on.
    """

    def __init__(self, batch_type: Any, capacity: int, n_pos: int, keeper: int = 0) -> None:
        self._n_pos = n_pos
        # Added to a row's sequence: its ids. llama.cpp masks by any one of them: both hold the same cells.
        self._ids = np.array([0, keeper] if keeper else [0], np.int32)
        self._token = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity * n_pos, np.int32)
        self._n_seq_id = np.full(capacity, len(self._ids), np.int32)
        self._seq_id = np.zeros((capacity, len(self._ids)), np.int32)
        self._logits = np.zeros(capacity, np.int8)
        # A row's list of ids is one row of _seq_id.
        self._seq_ids = self._seq_id.ctypes.data + self._seq_id.strides[0] * np.arange(capacity, dtype=np.uintp)
        self._types = dict(batch_type._fields_)
        self._batch = batch_type()
        for field in ("pos", "n_seq_id", "logits"):
            setattr(self._batch, field, self._pointer(getattr(self, f"_{field}"), field))
        self._batch.seq_id = self._pointer(self._seq_ids, "seq_id")
        self._tokens = self._pointer(self._token, "token")

    def _pointer(self, array: np.ndarray[Any, Any], field: str) -> Any:
        # Not `data_as`: each call of it leaves a cycle for the garbage collector.
        return ctypes.cast(array.ctypes.data, self._types[field])

    def tokens(self, batch: TokenBatch) -> Any:
        """A `llama_batch` of tokens, valid until the next call."""
        count = len(batch.tokens)
        self._token[:count] = batch.tokens
        self._pos[:count] = batch.positions
        self._seq_id[:count] = np.array(batch.seq_ids, np.int32)[:, np.newaxis] + self._ids
        self._logits[:count] = 0
        self._logits[batch.outputs] = 1
        self._batch.n_tokens, self._batch.token, self._batch.embd = count, self._tokens, None
        return self._batch

    def embeddings(self, rows: EmbeddingRows) -> Any:
        """A `llama_batch` of embeddings, valid until the next call and while `rows` is alive."""
        count = len(rows.rows)
        self._pos[: count * self._n_pos] = rows.positions.reshape(-1)
        self._seq_id[:count] = rows.seq_id + self._ids
        self._logits[:count] = 0
        self._logits[count - 1] = rows.logits
        embeddings = self._pointer(rows.rows, "embd")
        self._batch.n_tokens, self._batch.token, self._batch.embd = count, None, embeddings
        return self._batch


def token_logprob(logits: NDArray[np.float32], token: int, top: int, piece: Callable[[int], bytes]) -> TokenLogprob:
    """The log probability of `token`, and the `top` most likely tokens, best first, ties by token id.

    `logits` is float32 [n_vocab]. The sum is taken in float64: with 150,000 terms float32 loses the fourth digit.
    """
    peak = float(logits.max())
    norm = peak + float(np.log(np.exp(logits.astype(np.float64) - peak).sum()))
    top = min(top, len(logits))
    chosen = np.argpartition(logits, -top)[-top:] if top > 0 else np.array([], np.intp)
    order = chosen[np.lexsort((chosen, -logits[chosen]))]
    best = tuple((int(one), piece(int(one)), float(logits[one]) - norm) for one in order)
    return TokenLogprob(token, piece(token), float(logits[token]) - norm, best)
