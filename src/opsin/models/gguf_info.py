"""What a GGUF file says of itself, in the words a user needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from opsin.core.errors import ModelUnreadable
from opsin.models.gguf_header import GgufHeader, read_header
from opsin.models.naming import parts_of

if TYPE_CHECKING:
    from pathlib import Path

# llama.cpp's `llama_ftype`
# fmt: off
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS",
    20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M",
    28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
    39: "NVFP4",
}
# fmt: on

# projector type -> (tensor, which of its dimensions is the width handed to the language model).
# Source: `clip_n_mmproj_embd` and the tensor names in llama.cpp's `tools/mtmd/clip.cpp`. A type that is not listed
# is not checked here; llama.cpp checks every pair again when it loads.
_WIDTHS: dict[str, tuple[str, int]] = {
    "mlp": ("mm.2.weight", 1),
    "ldp": ("mm.model.mb_block.1.block.2.1.bias", 0),
    "ldpv2": ("mm.model.peg.0.bias", 0),
    "resampler": ("resampler.proj.weight", 0),
    "adapter": ("adapter.linear.dense_4h_to_h.weight", 1),
    "gemma3": ("mm.input_projection.weight", 0),
    "gemma3nv": ("mm.input_projection.weight", 0),
    "gemma4v": ("mm.input_projection.weight", 1),
    "idefics3": ("mm.model.fc.weight", 1),
    "deepseekocr": ("mm.model.fc.weight", 1),
    "deepseekocr2": ("mm.model.fc.weight", 1),
    "internvl": ("mm.model.mlp.3.weight", 1),
    "glm4v": ("mm.down.weight", 1),
    "janus_pro": ("mm.1.bias", 0),
    **dict.fromkeys(("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger", "youtuvl"), ("mm.2.bias", 0)),
    **dict.fromkeys(
        ("phi4", "pixtral", "lightonocr", "dots_ocr", "lfm2", "kimivl", "kimik25", "paddleocr"), ("mm.2.weight", 1)
    ),
}


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """One GGUF file, or all parts of a split one.

    Widths are in values, `context` in tokens, `image_size` and `patch_size` in pixels, `size` in bytes. `width` is
    what the language model takes in for a picture's token (with deepstack more than its embedding). What the file
    does not say is None. `tensor_types` counts tensors.
    """

    path: Path
    architecture: str
    name: str | None
    is_projector: bool
    has_vision: bool
    quantisation: str
    size: int
    tensor_types: dict[str, int]
    width: int | None = None
    layers: int | None = None
    context: int | None = None
    projector: str | None = None
    projector_width: int | None = None
    image_size: int | None = None
    patch_size: int | None = None

    @property
    def is_all_f32(self) -> bool:
        """Whether every tensor is f32, as in files called mmproj-F32."""
        return set(self.tensor_types) == {"F32"}


def read_info(path: Path) -> GgufInfo:
    """Read what a file says of itself; of a split model give the first part.

    Raises ModelNotFound (no such file, or a part is missing) and ModelUnreadable (not GGUF, cut short, no model).
    """
    header = read_header(path)
    headers = [header, *(read_header(part) for part in parts_of(path)[1:])]
    for part in headers:
        _check_length(part)
    architecture = header.text("general.architecture")
    if architecture is None:
        raise ModelUnreadable(f"{path} does not say what model it holds: general.architecture is missing")
    kind = header.text("general.type")
    if kind in {"adapter", "imatrix"}:
        raise ModelUnreadable(f"{path} is of the kind {kind!r}, not a model: give the model's own GGUF file")
    tensor_types = Counter(tensor.type or "unknown" for part in headers for tensor in part.tensors)
    info = GgufInfo(
        path=path,
        architecture=architecture,
        name=header.text("general.name"),
        is_projector=architecture == "clip",
        has_vision=bool(header.metadata.get("clip.has_vision_encoder", False)),
        quantisation=_quantisation(header, tensor_types),
        size=sum(part.size for part in headers),
        tensor_types=dict(tensor_types),
    )
    return _projector(info, header) if info.is_projector else _language_model(info, header)


def _check_length(header: GgufHeader) -> None:
    needed = max((tensor.end for tensor in header.tensors if tensor.end is not None), default=0)
    if needed > header.size:
        missing = (needed - header.size) / needed
        raise ModelUnreadable(f"{header.path} is cut short, {missing:.0%} of it is missing: download it again")


def _quantisation(header: GgufHeader, tensor_types: Counter[str]) -> str:
    """The file's own word for it, else the type of most of its tensors that are not plain f32."""
    named = _FILE_TYPES.get(header.integer("general.file_type") or 0)
    if "general.file_type" in header.metadata and named is not None:
        return named
    weights = {kind: count for kind, count in tensor_types.items() if kind != "F32"}
    return max(weights, key=lambda kind: weights[kind], default="F32")


def _language_model(info: GgufInfo, header: GgufHeader) -> GgufInfo:
    def value(key: str) -> int | None:
        return header.integer(f"{info.architecture}.{key}")

    width = value("embedding_length")
    if width is not None:
        width *= 1 + (value("n_deepstack_layers") or 0)  # `llama_hparams::n_embd_inp`
    return replace(info, width=width, layers=value("block_count"), context=value("context_length"))


def _projector(info: GgufInfo, header: GgufHeader) -> GgufInfo:
    return replace(
        info,
        projector=header.text("clip.projector_type") or header.text("clip.vision.projector_type"),
        projector_width=_projector_width(header),
        layers=header.integer("clip.vision.block_count"),
        image_size=header.integer("clip.vision.image_size"),
        patch_size=header.integer("clip.vision.patch_size"),
    )


def _projector_width(header: GgufHeader) -> int | None:
    kind = header.text("clip.projector_type") or header.text("clip.vision.projector_type") or ""
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    name, dimension = _WIDTHS.get(kind, ("", 0))
    if kind == "mlp" and "mm.3.bias" in shapes:  # LLaVA of the Yi kind, which llama.cpp tells by its tensors alone
        name, dimension = "mm.3.bias", 0
    shape = shapes.get(name, ())
    if len(shape) <= dimension:
        return None
    deepstack = sum(name.startswith("v.deepstack.") and name.endswith(".fc1.weight") for name in shapes)
    return shape[dimension] * (1 + deepstack if kind == "qwen3vl_merger" else 1)
