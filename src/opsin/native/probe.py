"""Where the computing really happens: one encode and one prefill, watched node by node.

Operations that a backend does not support run elsewhere without a word, so the graph itself is asked. Every watched
node is computed and synchronised alone, far slower than a timed run, so this runs on a context of its own. The buffer
of a result names the backend, except for accelerators beside the CPU (BLAS, Accelerate), which a note then tells.
"""

import math
import time
from collections import Counter
from contextlib import closing

from opsin.core.errors import EncodeFailed, ModelUnreadable
from opsin.core.model_info import BackendShare, Placement
from opsin.core.request import ImageChunk, ImagePart, TokenBatch
from opsin.core.settings import EngineSettings
from opsin.native.context import Context
from opsin.native.devices import devices, pick
from opsin.native.ggml import Tensor
from opsin.native.library import Library
from opsin.native.model import Model
from opsin.native.trial import drawn_image
from opsin.native.vision import Encoder, EvalHook

_COMPUTES_NOTHING = frozenset({"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
_COMPUTED = 16  # GGML_TENSOR_FLAG_COMPUTE: backends pass over nodes without it
# Fewer than 32: from there on llama.cpp copies weights that lie in host memory to a GPU for the one batch, which would
# hide where the decode steps run.
_PREFILL_TOKENS = 16
_PROBE_CTX = 256
_TWIN = 512 * 2**20  # bytes of an encoder beside its weights


class NodeCounter:
    """Keeps backend, operation, floating-point operations and seconds of every computing node, in their order."""

    def __init__(self, lib: Library) -> None:
        self._ggml = lib.ggml
        self._nodes: list[tuple[str, str, float, float]] = []
        self._started = 0.0

    def wants(self, node: Tensor) -> bool:
        """Every node that computes."""
        self._started = time.perf_counter()
        return bool(node.flags & _COMPUTED) and self._name(node) not in _COMPUTES_NOTHING

    def seen(self, node: Tensor) -> None:
        """Count it for its backend."""
        seconds = time.perf_counter() - self._started
        name = self._name(node)
        self._nodes.append((self._backend(node), name, flops(name, node), seconds))

    def _name(self, node: Tensor) -> str:
        return self._ggml.ggml_op_name(node.op).decode()

    def _backend(self, node: Tensor) -> str:
        ggml, buffer = self._ggml, node.buffer
        if not buffer and node.view_src:
            buffer = Tensor.from_address(node.view_src).buffer
        if not buffer:
            return "unknown"
        kind = ggml.ggml_backend_buffer_get_type(buffer)
        # Also the page-locked host memory of a GPU backend: what writes there is the CPU.
        if ggml.ggml_backend_buft_is_host(kind):
            return "CPU"
        device = ggml.ggml_backend_buft_get_device(kind)
        name: bytes = ggml.ggml_backend_dev_name(device) if device else ggml.ggml_backend_buffer_name(buffer)
        return name.decode()

    def shares(self) -> dict[str, BackendShare]:
        """The count by backend, the busiest first."""
        work = sum(node[2] for node in self._nodes) or 1.0
        time = sum(node[3] for node in self._nodes) or 1.0
        order = [node[0] for node in self._nodes]
        found = {}
        for name in dict.fromkeys(order):
            mine = [node for node in self._nodes if node[0] == name]
            found[name] = BackendShare(
                nodes=len(mine),
                share_of_ops=sum(node[2] for node in mine) / work,
                share_of_time=sum(node[3] for node in mine) / time,
                ops=dict(Counter(sorted(node[1] for node in mine)).most_common()),
                splits=sum(now == name != before for before, now in zip(["", *order], order, strict=False)),
            )
        return dict(sorted(found.items(), key=lambda item: -item[1].share_of_ops))


def flops(name: str, node: Tensor) -> float:
    """Floating-point operations of one node: exact for products, attention, convolutions; else one a value."""
    values = float(math.prod(node.ne))
    left, right, third = (Tensor.from_address(address) if address else None for address in node.src[:3])
    if left is None or right is None:
        return values
    if name in {"MUL_MAT", "MUL_MAT_ID", "OUT_PROD"}:
        return 2.0 * left.ne[0] * values
    if name == "FLASH_ATTN_EXT":
        # queries [head, n, heads, batch], keys [head, n_kv, …]: one product with the keys, one with the values
        return 2.0 * math.prod(left.ne[1:]) * right.ne[1] * (left.ne[0] + (third or left).ne[0])
    if name in {"CONV_2D", "CONV_3D"}:
        return 2.0 * math.prod(left.ne[:3]) * values  # the kernel [w, h, in, out]
    return values


def _watch_encode(model: Model, encoder: Encoder, settings: EngineSettings, counter: NodeCounter) -> str | None:
    """Encode a drawn image where the encoder runs; one that cannot be watched has a twin for that.

    Says why there is none: no room for a second one is no reason not to serve with the first. llama.cpp aborts where
    it finds none, so that is asked before.
    """
    if encoder.watched:
        _observe(encoder, counter)
        return None
    for device in pick(settings.mmproj_device, "--mmproj-device", devices())[:1]:
        if device.memory_total and device.memory_free < 2 * encoder.path.stat().st_size + _TWIN:
            return f"{device.name} has no room for a second one."
    try:
        with closing(Encoder(model, encoder.path, settings, encoder.sizes, watched=True)) as twin:
            _observe(twin, counter)
    except (ModelUnreadable, EncodeFailed) as error:
        return str(error)
    return None


def _observe(encoder: Encoder, counter: NodeCounter) -> None:
    with closing(encoder.tokenize([ImagePart(drawn_image())], add_bos=False)) as tokenized:
        encoder.observed(next(run for run in tokenized.chunks if isinstance(run, ImageChunk)), counter)


def probe_placement(model: Model, encoder: Encoder | None, settings: EngineSettings) -> Placement:
    """Watch one encode of a drawn image and one short prefill. Raises EncodeFailed, DecodeFailed, ModelError."""
    notes = []
    if any(device.type == "accel" for device in devices()):
        notes.append("An accelerator writes into host memory: some products shown as CPU may be its own.")
    encode, prefill, hook = NodeCounter(model.lib), NodeCounter(model.lib), EvalHook(model.lib)
    if encoder is not None and (why := _watch_encode(model, encoder, settings, encode)):
        notes.append(f"The encoder could not be watched: {why}")
    small = settings.model_copy(update={"parallel": 1, "ubatch": 32})
    rows = TokenBatch()
    rows.append([index % model.n_vocab for index in range(_PREFILL_TOKENS)], 0, 0, logits=True)
    context = Context(model, small, callback=hook.callback, ctx=_PROBE_CTX)
    with closing(context.handle), hook.observing(prefill):
        context.decode(rows)
        context.synchronize()
    encoded, prefilled = encode.shares(), prefill.shares()
    if "unknown" in encoded or "unknown" in prefilled:
        notes.append("Some nodes have no buffer of their own, so their backend cannot be told.")
    return Placement(encoded, prefilled, model.layers_offloaded, model.n_layer, tuple(notes))
