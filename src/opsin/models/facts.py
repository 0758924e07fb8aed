"""From two headers to the numbers that the memory planner works with."""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from opsin.core.model_info import LayerFacts, ModelFacts, PairFacts, ProjectorFacts
from opsin.models.gguf import PROJECTOR_TYPES, GgufHeader, ProjectorType, TensorHead, parts_of, read_header

_BLOCK = re.compile(r"blk\.(\d+)\.")
_LOOKED_UP = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")
_ALIGNMENT = 32
_ALL = {"gemma2": 2, "gemma3": 6, "cohere2": 4}  # each so many layers one attends to all, where no file says it
_CAUSAL_GEMMA4 = frozenset({1536, 2560})  # widths of the small Gemma 4 models, which read images causally


def read_facts(model: Path, mmproj: Path | None, image_max_tokens: int | None = None) -> PairFacts:
    """The facts of two files; of a split model give the first part. Raises ModelNotFound and ModelUnreadable."""
    headers = [read_header(part) for part in parts_of(model)]
    return pair_facts(headers, None if mmproj is None else read_header(mmproj), image_max_tokens)


def pair_facts(model: list[GgufHeader], mmproj: GgufHeader | None, image_max_tokens: int | None = None) -> PairFacts:
    """The facts of headers; `model` are those of all parts of a split file."""
    text = _model_facts(model)
    return PairFacts(text, None if mmproj is None else _projector_facts(mmproj, text.width, image_max_tokens))


def _model_facts(headers: list[GgufHeader]) -> ModelFacts:
    header = headers[0]
    arch = header.text("general.architecture") or ""
    tensors = {tensor.name: tensor for part in headers for tensor in part.tensors}
    width = header.integer(f"{arch}.embedding_length") or 0
    heads = header.integer(f"{arch}.attention.head_count") or max(1, width // 128)
    queries = heads * (header.integer(f"{arch}.attention.key_length") or width // heads)
    groups = defaultdict(list)
    for name, tensor in tensors.items():
        block = _BLOCK.match(name)
        groups[block[1] if block else "input" if name.startswith(_LOOKED_UP) else "output"].append(tensor)
    tied, embeddings = "output.weight" not in tensors, tensors.get("token_embd.weight")
    if tied and embeddings is not None:
        groups["output"].append(embeddings)
    layers = [_layer(groups[index], queries) for index in sorted(filter(str.isdigit, groups), key=int)]
    window = header.integer(f"{arch}.attention.sliding_window") or 0
    pattern = header.integer(f"{arch}.attention.sliding_window_pattern") or _ALL.get(arch, 1)
    forward = max((tensor.shape[1] for name, tensor in tensors.items() if name.endswith("ffn_up.weight")), default=0)
    return ModelFacts(
        name=header.path.name,
        layers=tuple(
            replace(layer, window=window if at % pattern < pattern - 1 else 0) for at, layer in enumerate(layers)
        ),
        input_bytes=sum(tensor.size for tensor in groups["input"]),
        output=_layer(groups["output"], queries),
        tied=tied,
        width=width,
        heads=heads,
        feed_forward=header.integer(f"{arch}.feed_forward_length") or forward or 4 * width,
        vocabulary=header.lengths.get("tokenizer.ggml.tokens", 0) or (embeddings.shape[1] if embeddings else 0),
        context=header.integer(f"{arch}.context_length") or 0,
        slides=window > 0,
    )


def _layer(tensors: list[TensorHead], queries: int) -> LayerFacts:
    matrices: Counter[str] = Counter()
    kv = 0
    for tensor in (tensor for tensor in tensors if len(tensor.shape) > 1):
        matrices[tensor.type or "unknown"] += tensor.size
        kind = tensor.name.split(".", 2)[-1]
        if kind in {"attn_k.weight", "attn_v.weight", "attn_kv_a_mqa.weight"}:
            kv += tensor.shape[1]
        elif kind == "attn_qkv.weight":
            kv += max(0, tensor.shape[1] - queries)
    return LayerFacts(sum(tensor.size for tensor in tensors), dict(matrices), kv)


def _projector_facts(header: GgufHeader, model_width: int, image_max_tokens: int | None) -> ProjectorFacts:
    kind = header.text("clip.projector_type") or header.text("clip.vision.projector_type") or ""
    keys = ("clip.vision.spatial_merge_size", "clip.vision.projector.scale_factor")
    usual = PROJECTOR_TYPES.get(kind, ProjectorType())
    merge = next((found for key in keys if (found := header.integer(key))), usual.merge)
    patch = header.integer("clip.vision.patch_size") or 14
    edge = header.integer("clip.vision.image_size") or 336
    patches, pixels = (edge // patch) ** 2, header.integer("clip.vision.image_max_pixels")
    if usual.most_tokens:
        patches = (image_max_tokens or usual.most_tokens) * merge**2
    elif pixels:
        patches = pixels // patch**2
    keeps_size = bool(usual.most_tokens or (usual.keeps_size and pixels))
    width = header.integer("clip.vision.embedding_length") or 1024
    return ProjectorFacts(
        name=header.path.name,
        bytes=sum(-(-tensor.size // _ALIGNMENT) * _ALIGNMENT for tensor in header.tensors),
        patches=patches,
        patch_values=3 * patch**2,
        tokens=patches // merge**2 if keeps_size or usual.one_size else None,
        width=width,
        heads=header.integer("clip.vision.attention.head_count") or 1,
        feed_forward=header.integer("clip.vision.feed_forward_length") or 4 * width,
        causal=not usual.whole or (kind == "gemma4v" and model_width in _CAUSAL_GEMMA4),
        cell=patch * merge if keeps_size else 0,
        least=usual.least_tokens or (header.integer("clip.vision.image_min_pixels") or 0) // (patch * merge) ** 2,
        limited=usual.limited,
    )
