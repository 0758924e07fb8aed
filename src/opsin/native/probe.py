"""Where the computing really happens: one encode and one prefill, watched node by node.

A device that was chosen is a wish. Operations that a backend does not support run elsewhere without a word, so the
graph itself is asked. Every watched node is computed and synchronised alone: far slower than a timed run, which is
why this runs apart, on a context of its own.

What a tensor tells is the buffer its result lies in. That names the backend except in one case: accelerators that
work beside the CPU (BLAS, Accelerate) write into host memory too; a note says so when such a device is here.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opsin.core.backend import TokenBatch
from opsin.core.layout import ImageRun
from opsin.core.parts import PicturePart
from opsin.core.placement import BackendShare, Placement
from opsin.native.context import Context
from opsin.native.devices import devices
from opsin.native.ggml import EvalHook, Tensor, op_names
from opsin.native.tokenize import lay_out
from opsin.native.trial import drawn_picture

if TYPE_CHECKING:
    from opsin.core.settings import EngineSettings
    from opsin.native.library import Library
    from opsin.native.model import Model
    from opsin.native.tokenize import Stretches
    from opsin.native.vision import Encoder

_COMPUTES_NOTHING = frozenset({"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
# Fewer than 32: from there on llama.cpp copies weights that lie in host memory to a GPU for the one batch, which would
# hide where the decode steps run.
_PREFILL_TOKENS = 16
_PROBE_CTX = 256


@dataclass(slots=True)
class _Tally:
    nodes: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    ops: dict[str, int] = field(default_factory=dict)
    splits: int = 0


class NodeCounter:
    """Counts computing nodes, their floating-point operations, their time and their stretches by backend."""

    def __init__(self, lib: Library) -> None:
        self._ggml = lib.ggml
        self._names = op_names(lib)
        self._tallies: dict[str, _Tally] = {}
        self._started = 0.0
        self._last: str | None = None

    def wants(self, node: Tensor) -> bool:
        """Every node that computes."""
        if self._names.get(node.op, "") in _COMPUTES_NOTHING:
            return False
        self._started = time.perf_counter()
        return True

    def seen(self, node: Tensor) -> None:
        """Add it to its backend."""
        seconds = time.perf_counter() - self._started
        backend = self._backend(node)
        tally = self._tallies.setdefault(backend, _Tally())
        # Nodes are seen in the order they are computed in.
        tally.splits += backend != self._last
        self._last = backend
        name = self._names.get(node.op, f"op {node.op}")
        tally.nodes += 1
        tally.flops += flops(name, node)
        tally.seconds += seconds
        tally.ops[name] = tally.ops.get(name, 0) + 1

    def _backend(self, node: Tensor) -> str:
        buffer = node.buffer
        if not buffer and node.view_src:
            buffer = Tensor.from_address(node.view_src).buffer
        if not buffer:
            return "unknown"
        kind = self._ggml.ggml_backend_buffer_get_type(buffer)
        # Also the page-locked host memory of a GPU backend: what writes there is the CPU.
        if self._ggml.ggml_backend_buft_is_host(kind):
            return "CPU"
        device = self._ggml.ggml_backend_buft_get_device(kind)
        name: bytes = (
            self._ggml.ggml_backend_dev_name(device) if device else self._ggml.ggml_backend_buffer_name(buffer)
        )
        return name.decode()

    def shares(self) -> dict[str, BackendShare]:
        """The count by backend, the busiest first."""
        flops_all = sum(tally.flops for tally in self._tallies.values()) or 1.0
        seconds_all = sum(tally.seconds for tally in self._tallies.values()) or 1.0
        return {
            name: BackendShare(
                nodes=tally.nodes,
                share_of_ops=tally.flops / flops_all,
                share_of_time=tally.seconds / seconds_all,
                ops=dict(sorted(tally.ops.items(), key=lambda item: (-item[1], item[0]))),
                splits=tally.splits,
            )
            for name, tally in sorted(self._tallies.items(), key=lambda item: -item[1].flops)
        }


def flops(name: str, node: Tensor) -> float:
    """Floating-point operations of one node: exact for products, attention, convolutions; else one a value."""
    values = float(math.prod(node.ne))
    left, right = _source(node, 0), _source(node, 1)
    if left is None or right is None:
        return values
    if name in {"MUL_MAT", "MUL_MAT_ID", "OUT_PROD"}:
        return 2.0 * left.ne[0] * values
    if name == "FLASH_ATTN_EXT":
        value = _source(node, 2)
        # queries [head, n, heads, batch], keys [head, n_kv, …]: one product with the keys, one with the values
        width = left.ne[0] + (value.ne[0] if value is not None else left.ne[0])
        return 2.0 * math.prod(left.ne[1:]) * right.ne[1] * width
    if name in {"CONV_2D", "CONV_3D"}:
        # the kernel [w, h, in, out]: each value of the output is a product over all but the last
        return 2.0 * math.prod(left.ne[:3]) * values
    if name == "CONV_2D_DW":
        return 2.0 * left.ne[0] * left.ne[1] * values
    return values


def _source(node: Tensor, index: int) -> Tensor | None:
    address = node.src[index]
    return Tensor.from_address(address) if address else None


def probe_placement(model: Model, encoder: Encoder | None, stretches: Stretches, settings: EngineSettings) -> Placement:
    """Watch one encode of a drawn picture and one short prefill. Raises EncodeFailed, DecodeFailed, ModelError."""
    notes = []
    if any(device.type == "accel" for device in devices(model.lib)):
        notes.append(
            "An accelerator beside the CPU writes into host memory: some products shown as CPU may be its own."
        )
    encoded: dict[str, BackendShare] = {}
    if encoder is not None:
        counter = NodeCounter(model.lib)
        layout = lay_out(model, encoder, stretches, [PicturePart(drawn_picture())], add_bos=False)
        try:
            run = next(run for run in layout.runs if isinstance(run, ImageRun))
            encoder.observed(run, counter)
        finally:
            layout.close()
        encoded = counter.shares()
    prefilled = _probe_prefill(model, settings)
    if "unknown" in encoded or "unknown" in prefilled:
        notes.append("Some nodes have no buffer of their own, so their backend cannot be told.")
    return Placement(encoded, prefilled, model.layers_offloaded, model.n_layer, tuple(notes))


def _probe_prefill(model: Model, settings: EngineSettings) -> dict[str, BackendShare]:
    hook, counter = EvalHook(model.lib), NodeCounter(model.lib)
    small = settings.model_copy(update={"parallel": 1, "ubatch": 32})
    context = Context(model, small, callback=hook.callback, ctx=_PROBE_CTX)
    try:
        rows = TokenBatch()
        rows.append([index % model.n_vocab for index in range(_PREFILL_TOKENS)], 0, 0, logits=True)
        with hook.observing(counter):
            context.decode(rows)
            context.synchronize()
    finally:
        context.handle.close()
    return counter.shares()
