"""What a llama_context is asked for: its size, its sequence ids, and how they share the cells of the KV cache."""

from typing import Any, NamedTuple

from opsin.core.errors import BadParameter
from opsin.core.ggml_types import KV_TYPES
from opsin.core.settings import CTX_PER_SEQUENCE, EngineSettings
from opsin.native.devices import default_threads
from opsin.native.memory import OUTPUTS, SPARE_SEQUENCES
from opsin.native.model import Model

_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_PARTS = 4  # of a batch on several GPUs, as in llama.cpp's own defaults


class ContextPlan(NamedTuple):
    """llama.cpp's parameters, and what they mean.

    `windows`: some layers attend to a sliding window. `whole`: a sequence has its state alone, which cannot be shared
    or forgotten in part. `keeper` is what is added to a sequence's id to get that of its keeper (0: there are none).
    `outputs` rows of a ubatch may have logits.
    """

    params: Any
    windows: bool
    whole: bool
    unified: bool
    keeper: int
    outputs: int


def plan_context(model: Model, settings: EngineSettings, ctx: int | None, *, parts: bool) -> ContextPlan:
    """For `ctx` tokens (None: as the settings say); `parts`: a batch may be computed in several.

    Each sequence of a sliding-window model has a keeper that holds the same cells. llama.cpp takes a cell outside the
    window of the only sequence that holds it as free, also with swa_full and while others are empty: a prefix would
    lose its beginning. A cell of two sequences stays.

    Raises BadParameter where a decode step of all answers would not fit a ubatch, with which llama.cpp aborts.
    """
    llama = model.lib.llama
    params = llama.llama_context_default_params()
    trained = min(model.n_ctx_train or CTX_PER_SEQUENCE, CTX_PER_SEQUENCE)
    params.n_ctx = ctx or settings.ctx or trained * settings.parallel
    params.n_ubatch = params.n_batch = rows = min(settings.ubatch, params.n_ctx)
    if parts and model.several_devices:
        # While one device works on a part of the rows, the one before it works on the next part.
        params.n_ubatch = max(1, rows // _PARTS)
    if settings.parallel > rows:
        raise BadParameter(
            f"{settings.parallel} answers at a time do not fit a ubatch of {rows}: "
            "give a smaller --parallel or a larger --ctx."
        )
    windows = llama.llama_model_n_swa(model.pointer) > 0 and not model.whole_states_only
    keeps = windows and settings.swa_full
    whole = model.whole_states_only or (windows and not keeps)
    # With parts of the cells a fork is a copy of what is saved. Where each id has a part or state none is spare.
    unified = settings.kv_unified is not False or windows or whole
    spare = SPARE_SEQUENCES if unified and not whole else 0
    sequences = min(settings.parallel + spare, _MAX_SEQUENCES // (2 if keeps else 1), rows)
    params.n_seq_max = sequences * (2 if keeps else 1)
    # Without it room is reserved for the logits of a whole ubatch: 0.6 GB with a vocabulary of 150,000.
    params.n_outputs_max = outputs = max(OUTPUTS, params.n_seq_max)
    if settings.device_sampling:
        params.n_outputs_max_per_seq = outputs
    size = llama.llama_model_n_params(model.pointer)
    params.n_threads = settings.threads or default_threads(size, offloaded=model.offloaded)
    params.n_threads_batch = settings.threads_batch or params.n_threads
    params.type_k = params.type_v = KV_TYPES[settings.kv_type]
    params.flash_attn_type = -1 if settings.flash_attention is None else int(settings.flash_attention)
    params.kv_unified, params.swa_full = unified, settings.swa_full
    return ContextPlan(params, windows, whole, unified, sequences if keeps else 0, outputs)
