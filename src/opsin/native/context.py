"""The KV memory and the computing of ubatches on it.

Many mistakes here are not errors in llama.cpp but the end of the process (an assertion in C). Each is checked before
the call, and raises instead.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.core.backend import BackendLimits, EmbeddingRows
from opsin.core.errors import BadParameter, DecodeFailed, ModelError
from opsin.core.ggml_types import KV_TYPES, bytes_per_value
from opsin.core.settings import CTX_PER_SEQUENCE
from opsin.native import logs
from opsin.native.batch import BatchArrays
from opsin.native.handles import Owned
from opsin.native.threads import default_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from opsin.core.backend import TokenBatch
    from opsin.core.settings import EngineSettings
    from opsin.native.model import Model

_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
# With unified memory a sequence id costs nothing, so idle prefixes get ids of their own beside the running answers.
_SPARE_SEQUENCES = 32
_MIN_OUTPUTS = 64  # rows of one ubatch that may have logits
_TILE = 64  # rows that flash attention takes at once in ggml's CPU kernel; with fewer it is slower than without
_KV_SHARE = 0.5  # of the free memory may go to KV memory when nobody gave a context size

_NOT_A_NUMBER = (
    "The language model computed a value that is not a number: the model file may be damaged, so download it again."
)


class Context:
    """One llama_context: the KV cache that all sequences share. All of it belongs to one thread at a time."""

    handle: Owned
    limits: BackendLimits

    def __init__(self, model: Model, settings: EngineSettings, *, callback: Any = None, ctx: int | None = None) -> None:
        self.llama = llama = model.lib.llama
        self._model = model
        params = llama.llama_context_default_params()
        params.n_ctx = ctx or settings.ctx or default_context(model, settings)
        params.n_ubatch = params.n_batch = min(settings.ubatch, params.n_ctx)
        sequences = _sequences(model, settings, params.n_ubatch)
        # Each sequence of a sliding-window model has a keeper that holds the same cells. llama.cpp takes a cell outside
        # the window of the only sequence that holds it as free, also with swa_full and while others are empty: a
        # prefix would lose its beginning. A cell of two sequences stays.
        self._keeper = sequences if _slides(model) else 0
        params.n_seq_max = sequences + self._keeper
        # Without it room is reserved for the logits of a whole ubatch: 0.6 GB with a vocabulary of 150,000.
        params.n_outputs_max = self._outputs_max = max(_MIN_OUTPUTS, params.n_seq_max)
        threads = settings.threads or default_threads(llama.llama_model_n_params(model.pointer))
        params.n_threads = threads
        params.n_threads_batch = settings.threads_batch or threads
        params.type_k = params.type_v = KV_TYPES[settings.kv_type]
        params.flash_attn_type = -1 if settings.flash_attention is None else int(settings.flash_attention)
        params.kv_unified = True
        # Sliding-window layers keep everything, so that prefixes stay whole.
        params.swa_full = True
        if callback is not None:
            params.cb_eval = callback
        mark = logs.SINK.mark()
        pointer = llama.llama_init_from_model(model.pointer, params)
        logs.SINK.raise_interrupt()
        if not pointer:
            raise ModelError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens "
                f"({logs.SINK.cause(mark) or 'probably not enough memory'}): give a smaller --ctx or another --kv-type."
            )
        self.handle = Owned("context", pointer, llama.llama_free, model.handle)
        self._memory = llama.llama_get_memory(pointer)
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
        self._row = ctypes.c_float * self.limits.n_vocab
        self._outputs: dict[int, int] = {}  # rows of the last batch that have logits, and where these are

    @property
    def pointer(self) -> int:
        """The native context."""
        return self.handle.pointer

    @property
    def threads(self) -> tuple[int, int]:
        """Threads of decode and of prefill."""
        return int(self.llama.llama_n_threads(self.pointer)), int(self.llama.llama_n_threads_batch(self.pointer))

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
        mark = logs.SINK.mark()
        if not causal:
            self.llama.llama_set_causal_attn(pointer, False)
        try:
            code = self.llama.llama_decode(pointer, batch)
        finally:
            if not causal:
                self.llama.llama_set_causal_attn(pointer, True)
        if code == 0:
            self._outputs = {row: index for index, row in enumerate(outputs)}
            return True
        if code == 1:
            return False
        self._outputs = {}
        raise DecodeFailed(
            f"The language model failed on a batch (llama_decode returned {code}"
            + (f": {cause}" if (cause := logs.SINK.cause(mark)) else "")
            + "): ask again, and with --verbose for llama.cpp's own log if it comes back."
        )

    def _check_tokens(self, rows: TokenBatch) -> None:
        """What llama.cpp answers with an abort; positions that do not follow each other it refuses itself."""
        self._check_count(len(rows.tokens))
        if not 0 <= min(rows.tokens) <= max(rows.tokens) < self.limits.n_vocab:
            raise DecodeFailed(f"A token is not in the vocabulary of {self.limits.n_vocab}.")
        self._check_sequence(min(rows.seq_ids))
        self._check_sequence(max(rows.seq_ids))
        if len(rows.outputs) > self._outputs_max:
            raise DecodeFailed(
                f"{len(rows.outputs)} rows of a batch want logits, and {self._outputs_max} are the limit."
            )

    def _check_embeddings(self, rows: EmbeddingRows) -> None:
        data, positions = rows.rows, rows.positions
        if data.ndim != 2 or data.shape[1] != self.limits.n_embd:
            raise DecodeFailed(f"Embedding rows have the shape {data.shape}, but must be [n, {self.limits.n_embd}].")
        if data.dtype != np.float32 or not data.flags.c_contiguous:
            raise DecodeFailed("Embedding rows must be contiguous float32.")
        count = len(data)
        self._check_count(count, whole=not rows.causal)
        if positions.shape != (self._model.n_pos, count):
            raise DecodeFailed(f"Positions have the shape {positions.shape}, not ({self._model.n_pos}, {count}).")
        if int(positions.min()) < 0:
            raise DecodeFailed("A position is negative.")
        self._check_sequence(rows.seq_id)
        times = positions[0]
        self._check_start(rows.seq_id, int(times.min()), strictly=self._model.n_pos == 1)
        if self._model.n_pos == 1 and count > 1 and not bool(np.all(np.diff(times) == 1)):
            raise DecodeFailed("Positions of an embedding must count up by one.")

    def _check_count(self, count: int, *, whole: bool = False) -> None:
        if count == 0:
            raise DecodeFailed("A batch holds no rows.")
        if count > self.limits.n_ubatch:
            raise DecodeFailed(
                f"A batch of {count} rows is larger than the ubatch of {self.limits.n_ubatch}"
                + (
                    ": this model reads a picture whole, so give a smaller --image-max-tokens or a larger ubatch."
                    if whole
                    else "."
                )
            )

    def _check_sequence(self, seq_id: int) -> None:
        if not 0 <= seq_id < self.limits.n_seq_max:
            raise DecodeFailed(f"There is no sequence {seq_id}: ids go from 0 to {self.limits.n_seq_max - 1}.")

    def _check_start(self, seq_id: int, pos: int, *, strictly: bool) -> None:
        """Positions go on where the memory ends; under M-RoPE they may jump forward, and slices may share one."""
        held = self.kv_last(seq_id)
        reaches_back = held >= 0 and (pos <= held if strictly else pos < held)
        wrong = pos != held + 1 if self._model.n_pos == 1 else reaches_back
        if wrong or pos < 0:
            raise DecodeFailed(f"Sequence {seq_id} holds positions up to {held}, so a batch cannot start at {pos}.")

    def synchronize(self) -> None:
        """Wait until all that was started is done."""
        self.llama.llama_synchronize(self.pointer)

    def logits(self, row: int) -> NDArray[np.float32]:
        """The raw logits of a batch row of the last decode (-1: the last that has any), float32 [n_vocab].

        A view of native memory, good until the next decode. Raises DecodeFailed when the row has none.
        """
        pointer = self.pointer
        if row not in self._outputs and not (row == -1 and self._outputs):
            raise DecodeFailed(f"Row {row} of the last batch has no logits.")
        address = self.llama.llama_get_logits_ith(pointer, row)
        if not address:
            raise DecodeFailed(f"llama.cpp gave no logits for row {row}.")
        memory: Any = self._row.from_address(ctypes.addressof(address.contents))
        view: NDArray[np.float32] = np.frombuffer(memory, np.float32)
        # One comparison instead of a scan: max() is not-a-number as soon as one logit is. Sorting such logits is
        # undefined in the native samplers.
        if np.isnan(view.max()):
            raise DecodeFailed(_NOT_A_NUMBER)
        return view

    def argmax(self, wanted: Sequence[tuple[int, NDArray[np.intp] | None]]) -> list[int | DecodeFailed]:
        """The most likely token of each of these rows of the last decode, without the tokens forbidden there."""
        address = self.llama.llama_get_logits(self.pointer)
        count, n_vocab = len(self._outputs), self.limits.n_vocab
        memory: Any = (ctypes.c_float * (count * n_vocab)).from_address(ctypes.addressof(address.contents))
        logits = np.frombuffer(memory, np.float32).reshape(count, n_vocab)
        places = [self._outputs[row] for row, _ in wanted]
        for place, (_, forbidden) in zip(places, wanted, strict=True):
            if forbidden is not None:
                logits[place, forbidden] = -np.inf
        if 2 * len(places) > count:  # looking at some rows in vain costs less than a call for each
            tokens = logits.argmax(axis=1)[places]
        else:
            tokens = np.array([logits[place].argmax() for place in places])
        # argmax gives the first value that is not a number where there is one.
        bad = np.isnan(logits[places, tokens])
        if not bad.any():
            return list(tokens.tolist())
        return [DecodeFailed(_NOT_A_NUMBER) if bad[i] else int(token) for i, token in enumerate(tokens)]

    def at(self, row: int) -> tuple[int, int]:
        """The native context that holds the logits of a batch row of the last decode, and which row they are there."""
        return self.pointer, row

    def kv_last(self, seq_id: int) -> int:
        """The last position held for a sequence, -1 when there is none."""
        self._check_sequence(seq_id)
        self.handle.pointer  # noqa: B018 - the memory is part of the context: raises when that is closed
        return int(self.llama.llama_memory_seq_pos_max(self._memory, seq_id))

    def kv_remove(self, seq_id: int, start: int, end: int) -> bool:
        """Forget positions [start, end); False when this memory cannot forget a part."""
        self._check_sequence(seq_id)
        self.handle.pointer  # noqa: B018 - as above
        if self._keeper:
            self.llama.llama_memory_seq_rm(self._memory, seq_id + self._keeper, start, end)
        return bool(self.llama.llama_memory_seq_rm(self._memory, seq_id, start, end))

    def kv_copy(self, source: int, target: int, start: int, end: int) -> None:
        """Let `target` share positions [start, end) of `source`. Raises DecodeFailed for a part of a state."""
        self._check_sequence(source)
        self._check_sequence(target)
        self.handle.pointer  # noqa: B018 - as above
        if self._model.whole_states_only and (start > 0 or 0 <= end <= self.kv_last(source)):
            raise DecodeFailed("This model keeps one state a sequence: a part of it cannot be copied.")
        if source == target:
            return
        self.llama.llama_memory_seq_cp(self._memory, source, target, start, end)
        if self._keeper:
            self.llama.llama_memory_seq_cp(self._memory, source, target + self._keeper, start, end)


def _sequences(model: Model, settings: EngineSettings, n_ubatch: int) -> int:
    """Sequence ids to ask for. A decode step of all of them must fit a ubatch, else llama.cpp aborts."""
    if settings.parallel > n_ubatch:
        raise BadParameter(
            f"{settings.parallel} answers at a time do not fit a ubatch of {n_ubatch}: "
            "give a smaller --parallel or a larger --ctx."
        )
    # A recurrent model keeps a whole state for each id: none to spare there.
    spare = 0 if model.whole_states_only else _SPARE_SEQUENCES
    return min(settings.parallel + spare, _MAX_SEQUENCES // (2 if _slides(model) else 1), n_ubatch)


def _slides(model: Model) -> bool:
    """Whether attention has a sliding window over memory that can be shared in parts."""
    return model.lib.llama.llama_model_n_swa(model.pointer) > 0 and not model.whole_states_only


def default_context(model: Model, settings: EngineSettings) -> int:
    """Tokens of context when nobody gave a number.

    Each of the parallel sequences gets the trained length, at most 8,192; all together at most what half of the free
    memory holds.
    """
    wanted = min(model.n_ctx_train or CTX_PER_SEQUENCE, CTX_PER_SEQUENCE) * settings.parallel
    cell = _cell_bytes(model, settings)
    free = _free_bytes(model)
    if free <= 0 or cell <= 0:
        return wanted
    fits = int(free * _KV_SHARE / cell) // 256 * 256
    if fits < min(wanted, 512):
        raise BadParameter(
            f"A context of {wanted} tokens needs {wanted * cell / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free: "
            "give --ctx, or --kv-type q8_0."
        )
    return min(wanted, fits)


def _cell_bytes(model: Model, settings: EngineSettings) -> float:
    """Bytes of a token's KV memory by a simple estimate: two rows of head_dim * kv_heads values a layer.

    Models that share or compress their cache need less than that.
    """
    llama, pointer = model.lib.llama, model.pointer
    heads = max(1, llama.llama_model_n_head(pointer))
    width = llama.llama_model_n_embd(pointer) // heads * max(1, llama.llama_model_n_head_kv(pointer))
    return 2 * width * model.n_layer * bytes_per_value(settings.kv_type)


def _free_bytes(model: Model) -> int:
    ggml = model.lib.ggml
    handle: int | None = model.device.handle if model.device is not None else None
    if handle is None:
        handles = [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]
        handle = next((one for one in handles if ggml.ggml_backend_dev_type(one) == 0), None)
    if not handle:
        return 0
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    return free.value
