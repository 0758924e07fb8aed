"""What a pair needs, from a shape's name or two files' headers: bytes, operations, tokens of a picture, memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from opsin.bench.cost import TILES, ModelCost, bytes_of, cost_of, encode_ops_of, picture_cost, read_cost
from opsin.models.blueprint import clip_tensors, llm_tensors
from opsin.models.gguf import GgufHeader, TensorHead, read_header, read_info
from opsin.models.naming import parts_of
from opsin.models.shapes import PairShape, TextShape, VisionShape
from opsin.models.weights import Tensor, WeightType

_UBATCH = 1024
_LOGIT_ROWS = 64

# A slice is small enough for seconds and large enough to meet memory as the whole does: prefill took more
# than four times as long in 16 layers of 27 MB as in 4, and about twice as long as in 8.
_SLICE_BYTES = 256 * 2**20
_GPU_SLICE_BYTES = 2 * 2**30
_SLICE_VOCABULARY = 32_000


@dataclass(frozen=True, slots=True)
class Needs:
    """A pair's needs. `llm_type` and `mmproj_type` are the types that most of its bytes have, in small letters.

    `llm_bytes` and `mmproj_bytes` are the files' sizes; `image_tokens` those of one picture, 0 where it cannot be
    told (then `cost.encode_ops` is None). `shape` has the same widths and counts, put together as LLaVA is.
    """

    name: str
    llm_type: str
    mmproj_type: str | None
    cost: ModelCost
    llm_bytes: float
    mmproj_bytes: float
    image_tokens: int
    shape: PairShape
    notes: tuple[str, ...] = ()

    def memory(self, ctx: int) -> dict[str, float]:
        """Bytes on the device with a context of `ctx` tokens: files, KV memory, and about what computing takes."""
        text, vision = self.shape.text, self.shape.vision
        rows = min(_UBATCH, ctx)
        compute = 4.0 * (rows * (2 * text.feed_forward + 4 * text.width) + _LOGIT_ROWS * text.vocabulary)
        if self.mmproj_type is not None:
            compute += 4.0 * vision.patches * (vision.feed_forward + 4 * vision.width)
        kv = ctx * self.cost.kv_values * self.cost.kv_value_bytes
        return {"model": self.llm_bytes, "projector": self.mmproj_bytes, "kv": kv, "compute": compute}


def shape_needs(shape: PairShape, llm_type: WeightType, mmproj_type: WeightType, kv_type: str = "f16") -> Needs:
    """The needs of a shape, without a file."""
    llm, clip = _heads(llm_tensors(shape, llm_type)), _heads(clip_tensors(shape, mmproj_type))
    vision, pieces = shape.vision, TILES if shape.vision.grids else 1
    llava = shape.family == "llava"
    ops = encode_ops_of(clip, vision.patches, vision.layers, merge=vision.merge, all_layers=not llava)
    return Needs(
        name=shape.name,
        llm_type=llm_type,
        mmproj_type=mmproj_type,
        cost=cost_of(llm, pieces * ops, kv_type),
        llm_bytes=sum(map(bytes_of, llm)),
        mmproj_bytes=sum(map(bytes_of, clip)),
        image_tokens=pieces * vision.patches // vision.merge**2,
        shape=shape,
        notes=(f"a picture is taken to be cut into {TILES} tiles",) if pieces > 1 else (),
    )


def file_needs(llm: Path, mmproj: Path | None, name: str, kv_type: str = "f16") -> Needs:
    """The needs of a pair of files, by their headers. Raises ModelNotFound and ModelUnreadable."""
    info, header = read_info(llm), read_header(llm)
    tensors = [t for part in parts_of(llm) for t in read_header(part).tensors]
    needs = Needs(
        name=name,
        llm_type=_main_type(t for t in tensors if t.name.startswith("blk.")),
        mmproj_type=None,
        cost=read_cost(llm, None, kv_type),
        llm_bytes=info.size,
        mmproj_bytes=0.0,
        image_tokens=0,
        shape=PairShape(name, _NO_VISION, _text_shape(header, info.width or 0, info.layers or 1), "read from a file"),
    )
    return needs if mmproj is None else _with_projector(needs, mmproj)


_NO_VISION = VisionShape(image_size=14, patch_size=14, width=64, layers=2, heads=1, feed_forward=128)


def _with_projector(needs: Needs, mmproj: Path) -> Needs:
    info, header = read_info(mmproj), read_header(mmproj)
    needs = replace(
        needs,
        mmproj_type=_main_type(t for t in header.tensors if t.name.startswith("v.blk.")),
        mmproj_bytes=float(info.size),
    )
    picture = picture_cost(mmproj)
    if picture is None:
        kind = info.projector or "unknown"
        note = f"how long a projector of the kind {kind!r} takes cannot be told from its file: pictures are left out"
        return replace(needs, notes=(*needs.notes, note))
    patch = info.patch_size or 1
    width = header.integer("clip.vision.embedding_length") or 64
    vision = VisionShape(
        # A square of about as many patches: what a slice sees.
        image_size=round(math.sqrt(picture.patches)) * patch,
        patch_size=patch,
        width=width,
        layers=max(2, info.layers or 2),
        heads=header.integer("clip.vision.attention.head_count") or 1,
        feed_forward=header.integer("clip.vision.feed_forward_length") or 4 * width,
    )
    return replace(
        needs,
        cost=replace(needs.cost, encode_ops=picture.ops),
        image_tokens=picture.pieces * picture.patches // picture.merge**2,
        shape=replace(needs.shape, vision=vision),
        notes=(*needs.notes, picture.note) if picture.note else needs.notes,
    )


def slice_of(needs: Needs, *, gpu: bool = False) -> tuple[PairShape, WeightType, WeightType]:
    """A pair to calibrate with: the same widths and types, at most half of the layers (but two at least).

    Of the language model's as many as make 256 MiB, far more than caches hold (with `gpu` 2 GiB, so that the fixed
    cost of a step is small). Types that Opsin cannot write are taken for the nearest that it can.
    """
    text, vision = needs.shape.text, needs.shape.vision
    layer = max(1.0, (needs.cost.weight_bytes / max(1, text.layers)))
    enough = math.ceil((_GPU_SLICE_BYTES if gpu else _SLICE_BYTES) / layer)
    layers = min(max(2, text.layers // 2), max(2, enough))
    shape = PairShape(
        name="slice",
        # The last block of a file does not run.
        vision=replace(vision, layers=max(2, 1 + math.ceil((vision.layers - 1) / 2)), merge=1, grids=()),
        text=replace(text, layers=layers, vocabulary=min(text.vocabulary, _SLICE_VOCABULARY), sections=None, window=0),
        note="a slice",
    )
    return shape, written_type(needs.llm_type), written_type(needs.mmproj_type or "f16", projector=True)


def written_type(kind: str, *, projector: bool = False) -> WeightType:
    """The type that `opsin synth` writes which computes most like `kind`."""
    if kind in {"bf16", "q8_0"}:
        return "bf16" if kind == "bf16" else "q8_0"
    if kind in {"f16", "f32"}:
        return "f16"
    return "q4_0" if not projector and kind[:3] in {"q4_", "iq4", "q3_", "iq3", "q2_", "iq2", "mxf"} else "q8_0"


def _text_shape(header: GgufHeader, width: int, layers: int) -> TextShape:
    arch = header.text("general.architecture") or ""
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    heads = header.integer(f"{arch}.attention.head_count") or max(1, width // 128)
    width = width - width % heads or heads
    kv_width = shapes.get("blk.0.attn_k.weight", (0, width))[1]
    # A slice needs heads that divide: models with heads of their own width come out near, and are scaled.
    kv_heads = max(1, min(heads, kv_width * heads // width))
    while heads % kv_heads:
        kv_heads -= 1
    return TextShape(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        feed_forward=header.integer(f"{arch}.feed_forward_length") or 4 * width,
        vocabulary=shapes.get("token_embd.weight", (0, _SLICE_VOCABULARY))[1],
        context=8192,
    )


def _heads(tensors: Iterable[Tensor]) -> list[TensorHead]:
    return [TensorHead(tensor.name, tensor.shape, tensor.type.upper(), None) for tensor in tensors]


def _main_type(tensors: Iterable[TensorHead]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[(tensor.type or "unknown").lower()] += int(bytes_of(tensor))
    return max(sizes, key=lambda kind: sizes[kind], default="unknown")
