"""The KV memory and the computing of micro-batches on it.

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
from opsin.native.devices import devices
from opsin.native.handles import Owned
from opsin.native.state import carry
from opsin.native.threads import default_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from opsin.core.backend import TokenRow
    from opsin.core.settings import EngineSettings
    from opsin.native.model import Model

_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
# With unified memory a sequence id costs nothing, so idle prefixes get ids of their own beside the running answers.
_SPARE_SEQUENCES = 32
_MIN_OUTPUTS = 64  # rows of one micro-batch that may have logits
# A step reads the weights and the cells. A cell hidden from a sequence costs more than its bytes say: on a CPU 1,150
# hidden ones took 29 % of a step where their bytes are 13 % of its (0.2 B parameters).
_HIDDEN_CELL = 2.2
_LEAST_STEP = 64 * 2**20  # a step of a tiny model takes as long as if it read so many bytes
_SPLIT_CTX = 1024  # tokens a sequence must get before each has a memory of its own
_SPLIT_CTX_UNASKED = 4096
_SPLIT_UBATCH = 256  # without flash attention all scores of a micro-batch are in memory at once
_SPLIT_ROWS = 192  # a picture in such slices leaves out half of the scores, those of what comes later
_WITHOUT_FLASH = frozenset({"f32", "f16", "bf16"})  # types a KV memory may have without flash attention
_KV_SHARE = 0.5  # of the free memory may go to KV memory when nobody gave a context size


class Context:
    """One llama_context. All of it belongs to one thread at a time.

    With `beside` it is one memory for the same sequences as those of another context, and for as large batches.
    It has `streams` memories: one for all sequences, or one for each. Under M-RoPE a token has `n_pos` = 4 positions,
    else one. With `flash` attention, values are not transposed in the KV memory.
    """

    handle: Owned
    limits: BackendLimits

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        *,
        callback: Any = None,
        ctx: int | None = None,
        beside: Context | None = None,
    ) -> None:
        self.llama = llama = model.lib.llama
        self._model = model
        params = llama.llama_context_default_params()
        params.n_ctx = ctx or settings.ctx or default_context(model, settings)
        params.n_ubatch = params.n_batch = min(settings.ubatch, params.n_ctx)
        split = beside is None and _split(model, settings, params.n_ctx)
        if split:
            # One stream more than answers: it is where an idle prefix goes that stands in a running one's way.
            params.n_ctx = _padded(params.n_ctx // settings.parallel) * (settings.parallel + 1)
            if "ubatch" not in settings.model_fields_set:
                params.n_ubatch = params.n_batch = min(params.n_ubatch, _SPLIT_UBATCH)
        sequences = settings.parallel + 1 if split else _sequences(model, settings, params.n_ubatch)
        if beside is not None:
            sequences, params.n_ubatch = beside.limits.n_seq_max, beside.limits.n_ubatch
            params.n_batch = params.n_ubatch
        # Each sequence of a sliding-window model has a keeper that holds the same cells. llama.cpp takes a cell outside
        # the window of the only sequence that holds it as free, also with swa_full and while others are empty: a
        # prefix would lose its beginning. A cell of two sequences stays.
        self._keeper = sequences if _slides(model) else 0
        params.n_seq_max = sequences + self._keeper
        # Without it room is reserved for the logits of a whole micro-batch: 0.6 GB with a vocabulary of 150,000.
        params.n_outputs_max = self._outputs_max = max(_MIN_OUTPUTS, params.n_seq_max)
        threads = settings.threads or default_threads(llama.llama_model_n_params(model.pointer))
        params.n_threads = threads
        params.n_threads_batch = settings.threads_batch or threads
        params.type_k = params.type_v = KV_TYPES[settings.kv_type]
        params.flash_attn_type = -1 if settings.flash_attention is None else int(settings.flash_attention)
        if (split or beside is not None) and settings.flash_attention is None:
            params.flash_attn_type = 0  # on CPUs it makes decode slower by a fifth, and prefill faster: docs/log.md
        params.kv_unified = not split
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
        self.streams = params.n_seq_max if split else 1
        self.n_pos = model.n_pos
        self.flash = params.flash_attn_type != 0
        self.limits = BackendLimits(
            n_ctx=llama.llama_n_ctx(pointer),
            n_batch=llama.llama_n_batch(pointer),
            n_ubatch=llama.llama_n_ubatch(pointer),
            n_seq_max=llama.llama_n_seq_max(pointer) - self._keeper,
            n_vocab=model.n_vocab,
            n_embd=model.n_embd,
            forks=not model.whole_states_only,
            shared=not split,
            best_rows=_SPLIT_ROWS if split else 0,
            cell_cost=_cell_cost(model, settings),
        )
        self._arrays = BatchArrays(llama.llama_batch, self.limits.n_ubatch, model.n_pos, self._keeper)
        self._row = ctypes.c_float * self.limits.n_vocab
        self._with_logits: frozenset[int] = frozenset()

    @property
    def pointer(self) -> int:
        """The native context."""
        return self.handle.pointer

    @property
    def threads(self) -> tuple[int, int]:
        """Threads of decode and of prefill."""
        return int(self.llama.llama_n_threads(self.pointer)), int(self.llama.llama_n_threads_batch(self.pointer))

    def decode(self, rows: Sequence[TokenRow] | EmbeddingRows) -> bool:
        """Run one micro-batch. False when the KV memory has no room, and nothing changed. Raises DecodeFailed."""
        pointer = self.pointer
        if isinstance(rows, EmbeddingRows):
            self._check_embeddings(rows)
            batch = self._arrays.embeddings(rows)
            count = len(rows.rows)
            with_logits = frozenset({count - 1} if rows.logits else ())
            causal = rows.causal
        else:
            self._check_tokens(rows)
            batch = self._arrays.tokens(rows)
            with_logits = frozenset(index for index, row in enumerate(rows) if row.logits)
            causal = True
        mark = logs.SINK.mark()
        if not causal:
            self.llama.llama_set_causal_attn(pointer, False)
        try:
            code = self.llama.llama_decode(pointer, batch)
        finally:
            if not causal:
                self.llama.llama_set_causal_attn(pointer, True)
        if code == 0:
            self._with_logits = with_logits
            return True
        if code == 1:
            return False
        self._with_logits = frozenset()
        raise DecodeFailed(
            f"The language model failed on a batch (llama_decode returned {code}"
            + (f": {cause}" if (cause := logs.SINK.cause(mark)) else "")
            + "): ask again, and with --verbose for llama.cpp's own log if it comes back."
        )

    def _check_tokens(self, rows: Sequence[TokenRow]) -> None:
        self._check_count(len(rows))
        last: dict[int, int] = {}
        for row in rows:
            if not 0 <= row.token < self.limits.n_vocab:
                raise DecodeFailed(f"Token {row.token} is not in the vocabulary of {self.limits.n_vocab}.")
            self._check_sequence(row.seq_id)
            before = last.get(row.seq_id)
            if before is None:
                self._check_start(row.seq_id, row.pos, strictly=True)
            elif row.pos != before + 1:
                raise DecodeFailed(
                    f"Positions of sequence {row.seq_id} jump from {before} to {row.pos} inside a batch: "
                    "they must count up by one."
                )
            last[row.seq_id] = row.pos
        wanted = sum(row.logits for row in rows)
        if wanted > self._outputs_max:
            raise DecodeFailed(f"{wanted} rows of a batch want logits, and {self._outputs_max} are the limit.")

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
                f"A batch of {count} rows is larger than the micro-batch of {self.limits.n_ubatch}"
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
        if not (row in self._with_logits or (row == -1 and self._with_logits)):
            raise DecodeFailed(f"Row {row} of the last batch has no logits.")
        address = self.llama.llama_get_logits_ith(pointer, row)
        if not address:
            raise DecodeFailed(f"llama.cpp gave no logits for row {row}.")
        memory: Any = self._row.from_address(ctypes.addressof(address.contents))
        view: NDArray[np.float32] = np.frombuffer(memory, np.float32)
        # One comparison instead of a scan: max() is not-a-number as soon as one logit is. Sorting such logits is
        # undefined in the native samplers.
        if np.isnan(view.max()):
            raise DecodeFailed(
                "The language model computed a value that is not a number: the model file may be damaged, "
                "so download it again."
            )
        return view

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
        if not self.limits.shared:
            # Not by llama_memory_seq_cp: from one memory to another that copies also what is empty.
            if start:
                raise DecodeFailed("Only the beginning of a sequence can be copied into a memory of its own.")
            carry(self, source, self, target)
            if end >= 0:
                self.llama.llama_memory_seq_rm(self._memory, target, end, -1)
        else:
            self.llama.llama_memory_seq_cp(self._memory, source, target, start, end)
            if self._keeper:
                self.llama.llama_memory_seq_cp(self._memory, source, target + self._keeper, start, end)


def _sequences(model: Model, settings: EngineSettings, n_ubatch: int) -> int:
    """Sequence ids to ask for. A decode step of all of them must fit a micro-batch, else llama.cpp aborts."""
    if settings.parallel > n_ubatch:
        raise BadParameter(
            f"{settings.parallel} answers at a time do not fit a micro-batch of {n_ubatch}: "
            "give a smaller --parallel or a larger --ctx."
        )
    # A recurrent model keeps a whole state for each id: none to spare there.
    spare = 0 if model.whole_states_only else _SPARE_SEQUENCES
    return min(settings.parallel + spare, _MAX_SEQUENCES // (2 if _slides(model) else 1), n_ubatch)


def _split(model: Model, settings: EngineSettings, n_ctx: int) -> bool:
    """Whether each sequence gets a memory of its own.

    On a CPU attention looks at every cell of a shared memory, also at those of others: three pictures in it make a
    decode step a quarter slower. Elsewhere, and where a sequence would get little room, sharing is worth more.
    """
    plain = not (_slides(model) or model.whole_states_only) and settings.kv_type in _WITHOUT_FLASH
    # Who chose no context did not choose to share it out in small parts either.
    least = _SPLIT_CTX if settings.ctx else _SPLIT_CTX_UNASKED
    fits = 1 < settings.parallel < min(_MAX_SEQUENCES, settings.ubatch, _SPLIT_UBATCH)
    return _on_cpu(model) and plain and fits and n_ctx // settings.parallel >= least


def _on_cpu(model: Model) -> bool:
    return model.n_gpu_layers == 0 or not any(device.is_gpu for device in devices(model.lib))


def _cell_cost(model: Model, settings: EngineSettings) -> float:
    hidden = _HIDDEN_CELL if _on_cpu(model) else 1.0
    step = max(_LEAST_STEP, model.lib.llama.llama_model_size(model.pointer))
    return float(hidden * _cell_bytes(model, settings) / step)


def _padded(n_ctx: int) -> int:
    return (n_ctx + 255) // 256 * 256


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
    if settings.parallel > 1 and _on_cpu(model):
        fits = fits * settings.parallel // (settings.parallel + 2)  # the place to spare, and the memories beside
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
