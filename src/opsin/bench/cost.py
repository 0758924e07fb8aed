"""What a model needs at least, from its file's header: bytes read and operations done, by step and by workload.

An operation is one multiplication or one addition. Norms, activations and sampling are left out: they are noise beside
the matrices. Mixtures of experts count the experts that a token uses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsin.bench.ceiling import Machine
from opsin.bench.workload import Workload
from opsin.core.answer import Usage
from opsin.core.ggml_types import KV_TYPES, TENSOR_TYPES, bytes_per_value
from opsin.models.gguf import GgufHeader, TensorHead, read_header, read_info
from opsin.models.naming import parts_of

KV_BYTES = {name: bytes_per_value(name) for name in KV_TYPES}
PICTURE = (640, 480)  # pixels, for families whose image tokens depend on the picture's size
TILES = 5  # LLaVA-1.6 cuts most pictures into four tiles, beside the whole
# Patches a side that become one image token, by projector, if the file does not say; source: llama.cpp's `clip.cpp`.
# Not those that cut a picture into tiles by its size (idefics3, internvl): how many pieces is not in the file.
_MERGE = {"mlp": 1, "gemma3": 4, "qwen2vl_merger": 2, "qwen2.5vl_merger": 2, "qwen3vl_merger": 2}
_BLOCKS = {name: (values, size) for name, values, size in TENSOR_TYPES.values()}


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A pair's needs. `weights` and `head` are what a token multiplies with in the layers, and for its logits.

    `weight_bytes` is what a decode step reads of the file; `kv_values` are values of keys and values a token leaves
    in all layers, `attention_width` the sum of the layers' attention widths. `encode_ops` is one picture, None for
    families whose pictures differ in size.
    """

    weight_bytes: float
    weights: float
    head: float
    kv_values: float
    attention_width: float
    encode_ops: float | None
    kv_value_bytes: float = 2.0

    def decode_bytes(self, contexts: Sequence[int]) -> float:
        """Bytes one step reads for sequences with so many tokens behind them."""
        return self.weight_bytes + sum(contexts) * self.kv_values * self.kv_value_bytes

    def decode_ops(self, context: int) -> float:
        """Operations one new token takes."""
        return 2 * (self.weights + self.head) + 4 * context * self.attention_width

    def prefill_ops(self, context: int) -> float:
        """Operations one prompt token takes behind `context` others; it needs no logits."""
        return 2 * self.weights + 4 * context * self.attention_width

    def step_seconds(self, machine: Machine, contexts: Sequence[int]) -> float:
        """The least time of a decode step on a machine."""
        ops = sum(self.decode_ops(context) for context in contexts)
        return max(self.decode_bytes(contexts) / machine.read_bytes_s, ops / machine.matrix_ops_s)

    def prompt_seconds(self, machine: Machine, tokens: int, context: int = 0, pictures: int = 0) -> float:
        """The least time to encode so many pictures and prefill so many tokens behind `context` others."""
        ops = tokens * self.prefill_ops(context + tokens // 2) + pictures * (self.encode_ops or 0.0)
        return ops / machine.matrix_ops_s

    def workload_seconds(self, machine: Machine, workload: Workload, usages: Sequence[Usage]) -> float:
        """The least time of a whole workload: each picture encoded and prefilled once, decode steps shared."""
        total, seen = 0.0, set()
        for ask, usage in zip(workload.asks, usages, strict=True):
            new = ask.picture not in seen
            seen.add(ask.picture)
            image = usage.image_tokens
            text = usage.prompt_tokens - image
            total += self.prompt_seconds(machine, text + image * new, image * (not new), pictures=int(new))
        groups = [usages] if workload.at_once else [[usage] for usage in usages]
        for group in groups:
            # The first token comes with the prompt.
            for step in range(1, max(usage.completion_tokens for usage in group)):
                contexts = [u.prompt_tokens + step for u in group if u.completion_tokens > step]
                total += self.step_seconds(machine, contexts)
        return total


def read_cost(llm: Path, mmproj: Path | None, kv_type: str = "f16") -> ModelCost:
    """Read both headers. Raises ModelNotFound and ModelUnreadable."""
    tensors = {t.name: t for part in parts_of(llm) for t in read_header(part).tensors}
    header = read_header(llm)
    share = _expert_share(header, header.text("general.architecture") or "")
    picture = None if mmproj is None else picture_cost(mmproj)
    return cost_of(tensors.values(), picture.ops if picture and not picture.note else None, kv_type, share)


def cost_of(
    tensors: Iterable[TensorHead], encode_ops: float | None = None, kv_type: str = "f16", expert_share: float = 1.0
) -> ModelCost:
    """The needs of a language model of these tensors; of tensors of experts a token uses `expert_share`."""
    named = {tensor.name: tensor for tensor in tensors}
    layers = [t for t in named.values() if t.name.startswith("blk.") and len(t.shape) >= 2]
    head = named.get("output.weight") or named.get("token_embd.weight")
    heads = [head] if head is not None else []
    kinds: Counter[str] = Counter()
    for tensor in layers:
        kind = tensor.name.split(".", 2)[2]
        if kind in {"attn_k.weight", "attn_v.weight"}:
            kinds["kv"] += tensor.shape[1]
        elif kind == "attn_output.weight":
            kinds["attention"] += tensor.shape[0]
    return ModelCost(
        weight_bytes=sum(bytes_of(t) * _used(t, expert_share) for t in layers) + sum(bytes_of(t) for t in heads),
        weights=sum(_values(t) * _used(t, expert_share) for t in layers),
        head=sum(_values(t) for t in heads),
        kv_values=kinds["kv"],
        attention_width=kinds["attention"],
        encode_ops=encode_ops,
        kv_value_bytes=KV_BYTES[kv_type],
    )


@dataclass(frozen=True, slots=True)
class PictureCost:
    """One picture: `pieces` of so many `patches`, of which `merge` a side become one token; `ops` are those of all.

    `note` says what is taken for families whose pictures differ in size.
    """

    patches: int
    merge: int
    pieces: int
    ops: float
    note: str | None = None


def picture_cost(mmproj: Path) -> PictureCost | None:
    """What a projector does with a picture, None where its file does not tell. Raises as `read_cost`."""
    info, header = read_info(mmproj), read_header(mmproj)
    kind, patch = info.projector or "", info.patch_size
    if kind not in _MERGE or not patch or not info.image_size:
        return None
    keys = ("clip.vision.spatial_merge_size", "clip.vision.projector.scale_factor")
    merge = next((found for key in keys if (found := header.integer(key))), _MERGE[kind])
    patches, pieces, note = (info.image_size // patch) ** 2, 1, None
    if kind.startswith("qwen"):
        patches = math.prod(max(1, round(edge / (patch * merge))) * merge for edge in PICTURE)
        note = f"image tokens depend on the picture's size: {PICTURE[0]}×{PICTURE[1]} pixels are taken"
    elif header.lengths.get("clip.vision.image_grid_pinpoints", 0):
        pieces, note = TILES, f"a picture is taken to be cut into {TILES} tiles"
    ops = encode_ops_of(header.tensors, patches, info.layers or 0, merge=merge, all_layers=kind != "mlp")
    return PictureCost(patches, merge, pieces, pieces * ops, note)


def encode_ops_of(
    tensors: Iterable[TensorHead], patches: int, layers: int, *, merge: int = 1, all_layers: bool = False
) -> float:
    """Operations of one picture of so many patches, of which `merge` a side become one token for the projector."""
    # llama.cpp runs all but the last of a LLaVA file's blocks (`tools/mtmd/models/llava.cpp`).
    last = "-" if all_layers else f"v.blk.{layers - 1}."
    ops = 0.0
    for tensor in tensors:
        if len(tensor.shape) < 2 or tensor.name.startswith(last) or tensor.name.startswith("v.position_embd"):
            continue
        ops += 2 * _values(tensor) * (patches / merge**2 if tensor.name.startswith("mm.") else patches)
        if tensor.name.startswith("v.blk.") and tensor.name.endswith("attn_out.weight"):
            ops += 4 * patches**2 * tensor.shape[0]
    return ops


def _expert_share(header: GgufHeader, arch: str) -> float:
    count, used = header.integer(f"{arch}.expert_count"), header.integer(f"{arch}.expert_used_count")
    return used / count if count and used else 1.0


def _used(tensor: TensorHead, share: float) -> float:
    return share if "_exps" in tensor.name else 1.0


def _values(tensor: TensorHead) -> int:
    count = 1
    for length in tensor.shape:
        count *= length
    return count


def bytes_of(tensor: TensorHead) -> float:
    """Bytes of a tensor in a file; of a type unknown here as f32."""
    values, size = _BLOCKS.get(tensor.type or "", (1, 4))
    return _values(tensor) / values * size
