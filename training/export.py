"""Checkpoint -> two GGUF files in llama.cpp's own layouts: the text model and the mmproj."""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from training.model import IMAGE_MEAN, IMAGE_STD, Config, Llava
from training.tokenizer import CHAT_TEMPLATE, UNKNOWN, Tokenizer

TEXT_FILE, VISION_FILE = "opsin-demo.gguf", "mmproj-opsin-demo.gguf"
NAME = "Opsin demo (drawn scenes)"
DESCRIPTION = "A small LLaVA trained from scratch on drawn scenes, to show Opsin at work."


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, full: bool = False) -> None:
    """Matrices go out as f16; norms, biases and position embeddings (`full`) as f32."""
    data = tensor.detach().float().numpy()
    kind = np.float32 if full or data.ndim == 1 else np.float16
    writer.add_tensor(name, np.ascontiguousarray(data.astype(kind)))


def _general(writer: gguf.GGUFWriter, kind: str) -> None:
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license("MIT")
    writer.add_type(kind)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _ in tokenizer.pieces])
    writer.add_token_scores(tokenizer.scores)
    writer.add_token_types([kind for _, kind in tokenizer.pieces])
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_unk_token_id([k for _, k in tokenizer.pieces].index(UNKNOWN))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_text(path: Path, model: Llava, tokenizer: Tokenizer) -> None:
    """Write the text model with its vocabulary."""
    c, text = model.c, model.text
    writer = gguf.GGUFWriter(path, "llama")
    _general(writer, "model")
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.t_width)
    writer.add_block_count(c.t_layers)
    writer.add_feed_forward_length(c.t_ff)
    writer.add_head_count(c.t_heads)
    writer.add_head_count_kv(c.t_heads)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_rope_dimension_count(c.t_width // c.t_heads)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_vocab_size(c.vocab)
    _vocabulary(writer, tokenizer)
    _add(writer, "token_embd.weight", text.embed.weight)
    for i, block in enumerate(text.blocks):
        _add(writer, f"blk.{i}.attn_norm.weight", block.norm1.weight)
        for name, part in zip("qkv", block.qkv.weight.chunk(3), strict=True):
            _add(writer, f"blk.{i}.attn_{name}.weight", part)
        _add(writer, f"blk.{i}.attn_output.weight", block.out.weight)
        _add(writer, f"blk.{i}.ffn_norm.weight", block.norm2.weight)
        for name, part in zip(("gate", "up"), block.gate_up.weight.chunk(2), strict=True):
            _add(writer, f"blk.{i}.ffn_{name}.weight", part)
        _add(writer, f"blk.{i}.ffn_down.weight", block.down.weight)
    _add(writer, "output_norm.weight", text.norm.weight)
    _add(writer, "output.weight", text.head.weight)
    _close(writer)


def write_vision(path: Path, model: Llava) -> None:
    """Write the tower and the projector."""
    c, vision = model.c, model.vision
    writer = gguf.GGUFWriter(path, "clip")
    _general(writer, "mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    writer.add_uint32("clip.vision.image_size", c.image)
    writer.add_uint32("clip.vision.patch_size", c.patch)
    writer.add_uint32("clip.vision.embedding_length", c.v_width)
    writer.add_uint32("clip.vision.feed_forward_length", c.v_ff)
    writer.add_uint32("clip.vision.projection_dim", c.t_width)
    writer.add_uint32("clip.vision.block_count", c.v_layers)
    writer.add_uint32("clip.vision.attention.head_count", c.v_heads)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", c.eps)
    # llama.cpp stops a LLaVA tower one block short of the end unless told which output to take.
    writer.add_array("clip.vision.feature_layer", [c.v_layers])
    writer.add_array("clip.vision.image_mean", [IMAGE_MEAN] * 3)
    writer.add_array("clip.vision.image_std", [IMAGE_STD] * 3)
    _add(writer, "v.patch_embd.weight", vision.patch.weight.view(-1, 3, c.patch, c.patch))
    _add(writer, "v.patch_embd.bias", vision.patch.bias)
    _add(writer, "v.position_embd.weight", vision.position, full=True)
    norms = {"v.pre_ln": vision.pre_ln, "v.post_ln": vision.post_ln}
    linears = {"mm.0": model.mm0, "mm.2": model.mm2}
    for i, block in enumerate(vision.blocks):
        at = f"v.blk.{i}"
        norms |= {f"{at}.ln1": block.ln1, f"{at}.ln2": block.ln2}
        linears |= {f"{at}.attn_out": block.out, f"{at}.ffn_up": block.up,
                    f"{at}.ffn_down": block.down}  # fmt: skip
        weights, biases = block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            _add(writer, f"{at}.attn_{name}.weight", weight)
            _add(writer, f"{at}.attn_{name}.bias", bias)
    for name, module in (norms | linears).items():
        _add(writer, f"{name}.weight", module.weight)
        _add(writer, f"{name}.bias", module.bias)
    _close(writer)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(path: Path) -> None:
    """Read a file back: every tensor finite."""
    for tensor in gguf.GGUFReader(path).tensors:
        if not np.isfinite(tensor.data.astype(np.float32)).all():
            raise ValueError(f"{path.name}: {tensor.name} is not finite")


def export(model: Llava, tokenizer: Tokenizer, folder: Path) -> None:
    """Write both files beside their final names, check them, then put them in place."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (
        (TEXT_FILE, lambda p: write_text(p, model, tokenizer)),
        (VISION_FILE, lambda p: write_vision(p, model)),
    ):
        part = folder / f".{name}.part"
        write(part)
        check(part)
        part.replace(folder / name)
        print(f"{folder / name}: {(folder / name).stat().st_size / 1e6:.2f} MB")


def load(checkpoint: Path | None, tokenizer: Tokenizer) -> Llava:
    """The model of a language or joint checkpoint; without one, an untrained model."""
    torch.manual_seed(0)
    model = Llava(Config(vocab=len(tokenizer)))
    if checkpoint:
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model.eval()


def main() -> None:
    """Export one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="language.pt or joint.pt; none: untrained")
    parser.add_argument("--to", type=Path, default=Path("src/opsin/models/demo"))
    args = parser.parse_args()
    tokenizer = Tokenizer()
    export(load(args.checkpoint, tokenizer), tokenizer, args.to)


if __name__ == "__main__":
    main()
