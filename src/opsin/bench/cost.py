"""What a model needs at least, by its file's header: bytes read by a decode step, operations of prefill and encode.

An operation is one multiplication or addition of a matrix product. Of experts only those a token uses are counted.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsin.bench.workloads import Workload
from opsin.core.answer import Usage
from opsin.core.ggml_types import bytes_per_value
from opsin.models.gguf import TensorHead, parts_of, read_header, read_info

IMAGE = (640, 480)  # pixels, for families whose image tokens depend on the image's size
SIZE_NOTE = f"image tokens depend on the image's size: {IMAGE[0]}×{IMAGE[1]} pixels are assumed"
TILES = 5  # LLaVA-1.6 cuts most images into four tiles, beside the whole
# Side of the square of patches that becomes one image token, if the file does not say; source: llama.cpp's `clip.cpp`.
# Without those whose number of tiles is not in the file (idefics3, internvl).
_MERGE = {"mlp": 1, "gemma3": 4, "qwen2vl_merger": 2, "qwen2.5vl_merger": 2, "qwen3vl_merger": 2}


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a device reaches at best: bytes read and operations of a large matrix product, per second."""

    device: str
    read_bytes_s: float
    matrix_ops_s: float


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a pair needs; `encode_ops` is for one image, None for families whose images differ in size.

    `weights` and `head`: values a token is multiplied with in the layers and for its logits. `weight_bytes`: read by a
    decode step. `kv_values` a token leaves in all layers. `attention_width`: the sum over the layers.
    """

    weight_bytes: float
    weights: float
    head: float
    kv_values: float
    attention_width: float
    encode_ops: float | None
    kv_value_bytes: float = 2.0

    def decode_bytes(self, contexts: Sequence[int]) -> float:
        """Bytes read by one decode step of sequences with these context lengths."""
        return self.weight_bytes + sum(contexts) * self.kv_values * self.kv_value_bytes

    def step_seconds(self, ceiling: Ceiling, contexts: Sequence[int]) -> float:
        """The least time of a decode step."""
        ops = 2 * len(contexts) * (self.weights + self.head) + 4 * sum(contexts) * self.attention_width
        return max(self.decode_bytes(contexts) / ceiling.read_bytes_s, ops / ceiling.matrix_ops_s)

    def prompt_seconds(self, ceiling: Ceiling, tokens: int, context: int = 0, images: int = 0) -> float:
        """The least time to encode `images` and prefill `tokens` after `context` others; they need no logits."""
        ops = tokens * (2 * self.weights + 4 * (context + tokens // 2) * self.attention_width)
        return (ops + images * (self.encode_ops or 0.0)) / ceiling.matrix_ops_s

    def workload_seconds(self, ceiling: Ceiling, workload: Workload, usages: Sequence[Usage]) -> float:
        """The least time of a whole workload: each image is encoded and prefilled once, decode steps are shared."""
        total, seen = 0.0, set()
        for ask, usage in zip(workload.asks, usages, strict=True):
            new = ask.image not in seen
            seen.add(ask.image)
            image, text = usage.image_tokens, usage.prompt_tokens - usage.image_tokens
            total += self.prompt_seconds(ceiling, text + image * new, image * (not new), images=int(new))
        for group in [usages] if workload.at_once else [[usage] for usage in usages]:
            # The first token comes from the prompt's logits.
            for step in range(1, max(usage.completion_tokens for usage in group)):
                contexts = [u.prompt_tokens + step for u in group if u.completion_tokens > step]
                total += self.step_seconds(ceiling, contexts)
        return total


@dataclass(frozen=True, slots=True)
class ImageCost:
    """Tokens and operations of one image; `note` says what is assumed for families whose images differ in size.

    Without operations, and with no tokens, where the projector's file does not tell them.
    """

    tokens: int
    ops: float | None
    note: str | None = None


def read_cost(llm: Path, mmproj: Path | None, kv_type: str = "f16") -> ModelCost:
    """Read both headers. Raises ModelNotFound and ModelUnreadable."""
    header = read_header(llm)
    tensors = {tensor.name: tensor for part in parts_of(llm) for tensor in read_header(part).tensors}
    arch = header.text("general.architecture") or ""
    experts, used = header.integer(f"{arch}.expert_count"), header.integer(f"{arch}.expert_used_count")
    share = used / experts if experts and used else 1.0  # of the tensors of experts
    layers = [
        (tensor.name.split(".", 2)[2], tensor, share if "_exps" in tensor.name else 1.0)
        for tensor in tensors.values()
        if tensor.name.startswith("blk.") and len(tensor.shape) >= 2
    ]
    head = tensors.get("output.weight") or tensors.get("token_embd.weight")
    image = None if mmproj is None else image_cost(mmproj)
    return ModelCost(
        weight_bytes=sum(tensor.size * part for _, tensor, part in layers) + (head.size if head else 0.0),
        weights=sum(math.prod(tensor.shape) * part for _, tensor, part in layers),
        head=math.prod(head.shape) if head else 0,
        kv_values=sum(tensor.shape[1] for kind, tensor, _ in layers if kind in {"attn_k.weight", "attn_v.weight"}),
        attention_width=sum(tensor.shape[0] for kind, tensor, _ in layers if kind == "attn_output.weight"),
        encode_ops=image.ops if image and not image.note else None,
        kv_value_bytes=bytes_per_value(kv_type),
    )


def image_cost(mmproj: Path) -> ImageCost:
    """What a projector does with one image. Raises like `read_cost`."""
    kind, header = read_info(mmproj).projector or "", read_header(mmproj)
    edge, patch, layers = (header.integer(f"clip.vision.{key}") for key in ("image_size", "patch_size", "block_count"))
    if kind not in _MERGE or not patch or not edge:
        return ImageCost(0, None, "how long this projector takes cannot be told from its file: images are left out")
    keys = ("clip.vision.spatial_merge_size", "clip.vision.projector.scale_factor")
    merge = next((found for key in keys if (found := header.integer(key))), _MERGE[kind])
    patches, pieces, note = (edge // patch) ** 2, 1, None
    if kind.startswith("qwen"):
        patches, note = math.prod(max(1, round(pixels / (patch * merge))) * merge for pixels in IMAGE), SIZE_NOTE
    elif header.lengths.get("clip.vision.image_grid_pinpoints", 0):
        pieces, note = TILES, f"an image is assumed to be cut into {TILES} tiles"
    ops = encode_ops_of(header.tensors, patches, layers or 0, merge=merge, all_layers=kind != "mlp")
    return ImageCost(pieces * patches // merge**2, pieces * ops, note)


def encode_ops_of(
    tensors: Iterable[TensorHead], patches: int, layers: int, *, merge: int = 1, all_layers: bool = False
) -> float:
    """Operations to encode `patches`, of which a square of `merge` × `merge` becomes one token for the projector."""
    # llama.cpp runs all but the last of a LLaVA file's blocks (`tools/mtmd/models/llava.cpp`).
    skipped = "-" if all_layers else f"v.blk.{layers - 1}."
    used = [one for one in tensors if len(one.shape) > 1 and not one.name.startswith((skipped, "v.position_embd"))]
    ops = sum(
        2 * math.prod(one.shape) * (patches / merge**2 if one.name.startswith("mm.") else patches) for one in used
    )
    outs = [one for one in used if one.name.startswith("v.blk.") and one.name.endswith("attn_out.weight")]
    return ops + sum(4 * patches**2 * one.shape[0] for one in outs)
