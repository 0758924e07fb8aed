"""An independent run of the shipped files in PyTorch, as a reference for the real runtime.

Loads the GGUF pair's own weights into `training.model`, answers questions about scenes drawn at the
model's own input size (so that no resize is involved) and writes token ids and the two best logits
of every step to training/reference/parity.json, with the images beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from training.exam import questions_about
from training.export import TEXT_FILE, VISION_FILE
from training.model import Config, Llava
from training.questions import Question, judge
from training.scenes import IMAGE_SIZE, fit, make_scene, render
from training.tokenizer import ASSISTANT, USER, Tokenizer

SPLIT = "heldout"


def _tensors(reader: gguf.GGUFReader) -> dict[str, Tensor]:
    return {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32))
        for t in reader.tensors
    }


def _value(reader: gguf.GGUFReader, key: str) -> float:
    return reader.fields[key].contents()


def _config(text: gguf.GGUFReader, vision: gguf.GGUFReader, vocab: int) -> Config:
    return Config(
        vocab=vocab,
        image=_value(vision, "clip.vision.image_size"),
        patch=_value(vision, "clip.vision.patch_size"),
        v_width=_value(vision, "clip.vision.embedding_length"),
        v_layers=_value(vision, "clip.vision.block_count"),
        v_heads=_value(vision, "clip.vision.attention.head_count"),
        v_ff=_value(vision, "clip.vision.feed_forward_length"),
        t_width=_value(text, "llama.embedding_length"),
        t_layers=_value(text, "llama.block_count"),
        t_heads=_value(text, "llama.attention.head_count"),
        t_ff=_value(text, "llama.feed_forward_length"),
        context=_value(text, "llama.context_length"),
    )


def _vision_state(got: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    state = {
        "vision.patch.weight": got["v.patch_embd.weight"].flatten(1),
        "vision.patch.bias": got["v.patch_embd.bias"],
        "vision.position": got["v.position_embd.weight"],
    }
    names = {"mm.0": "mm0", "mm.2": "mm2", "v.pre_ln": "vision.pre_ln", "v.post_ln": "vision.post_ln"}
    for i in range(layers):
        at, to = f"v.blk.{i}", f"vision.blocks.{i}"
        names |= {f"{at}.ln1": f"{to}.ln1", f"{at}.ln2": f"{to}.ln2", f"{at}.attn_out": f"{to}.out",
                  f"{at}.ffn_up": f"{to}.up", f"{at}.ffn_down": f"{to}.down"}  # fmt: skip
    for name, to in names.items():
        state |= {f"{to}.{kind}": got[f"{name}.{kind}"] for kind in ("weight", "bias")}
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [got[f"v.blk.{i}.attn_{part}.{kind}"] for part in "qkv"]
            state[f"vision.blocks.{i}.qkv.{kind}"] = torch.cat(parts)
    return state


def _text_state(got: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    state = {
        "text.embed.weight": got["token_embd.weight"],
        "text.norm.weight": got["output_norm.weight"],
        "text.head.weight": got["output.weight"],
    }
    for i in range(layers):
        at, to = f"blk.{i}", f"text.blocks.{i}"
        state |= {
            f"{to}.norm1.weight": got[f"{at}.attn_norm.weight"],
            f"{to}.qkv.weight": torch.cat([got[f"{at}.attn_{p}.weight"] for p in "qkv"]),
            f"{to}.out.weight": got[f"{at}.attn_output.weight"],
            f"{to}.norm2.weight": got[f"{at}.ffn_norm.weight"],
            f"{to}.gate_up.weight": torch.cat([got[f"{at}.ffn_{p}.weight"] for p in ("gate", "up")]),
            f"{to}.down.weight": got[f"{at}.ffn_down.weight"],
        }
    return state


def load_pair(folder: Path) -> Llava:
    """The model in a folder's two GGUF files; the training-only heads stay random."""
    text, vision = (gguf.GGUFReader(folder / name) for name in (TEXT_FILE, VISION_FILE))
    words, pixels = _tensors(text), _tensors(vision)
    config = _config(text, vision, len(words["token_embd.weight"]))
    model = Llava(config)
    state = _vision_state(pixels, config.v_layers) | _text_state(words, config.t_layers)
    missing, extra = model.load_state_dict(state, strict=False)
    if extra or any(not name.startswith("heads.") for name in missing):
        raise ValueError(f"the files do not hold this model: missing {missing}, extra {extra}")
    return model.eval()


@torch.no_grad()
def greedy(model: Llava, tokenizer: Tokenizer, picture: np.ndarray, question: str) -> list[list[tuple[int, float]]]:
    """The two best (token, logit) of every greedy step, end token included."""
    head = torch.tensor([tokenizer.bos, tokenizer.user])
    image = model.project(model.vision(torch.from_numpy(picture)[None]))
    ids = tokenizer.prompt(question)
    steps: list[list[tuple[int, float]]] = []
    while len(steps) < 110:
        sequence = torch.cat((model.text.embed(head)[None], image, model.text.embed(torch.tensor(ids))[None]), 1)
        hidden, _ = model.text.prefix(sequence)
        best = model.text.logits(hidden[0, -1]).topk(2)
        steps.append([(int(i), round(float(v), 4)) for v, i in zip(*best, strict=True)])
        if steps[-1][0][0] == tokenizer.eos:
            break
        ids.append(steps[-1][0][0])
    return steps


def _entry(model: Llava, tokenizer: Tokenizer, index: int, question: Question, name: str) -> dict[str, object]:
    picture = fit(render(make_scene(SPLIT, index), IMAGE_SIZE))
    steps = greedy(model, tokenizer, picture, question.text)
    ids = [step[0][0] for step in steps]
    answer = tokenizer.decode([i for i in ids if i != tokenizer.eos])
    return {
        "picture": name,
        "split": SPLIT,
        "scene": index,
        "question": question.text,
        "prompt": f"<s>{USER}<image>{question.text}{ASSISTANT}",
        "prompt_ids": [tokenizer.bos, tokenizer.user, "image", *tokenizer.prompt(question.text)],
        "answer": answer,
        "right": judge(question, answer),
        "answer_ids": ids,
        "top2": steps,
    }


def reference(folder: Path, to: Path, scenes: int, each: int) -> list[dict[str, object]]:
    """Answers to `each` questions about each of the first scenes, images written out beside."""
    from PIL import Image

    model, tokenizer = load_pair(folder), Tokenizer()
    images = to.parent / "pictures"
    images.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, object]] = []
    index = 0
    while len(entries) < scenes * each:
        scene = make_scene(SPLIT, index)
        if not scene.landscape:
            name = f"{index:03d}.png"
            Image.fromarray(fit(render(scene, IMAGE_SIZE))).save(images / name)
            asked = questions_about(scene, index)[:each]
            entries += [_entry(model, tokenizer, index, q, f"images/{name}") for q in asked]
        index += 1
    return entries


def main() -> None:
    """Write the reference of the files in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("src/opsin/models/demo"))
    parser.add_argument("--to", type=Path, default=Path("training/reference/parity.json"))
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--each", type=int, default=3, help="questions a scene")
    args = parser.parse_args()
    entries = reference(args.models, args.to, args.scenes, args.each)
    files = {name: hashlib.sha256((args.models / name).read_bytes()).hexdigest() for name in (TEXT_FILE, VISION_FILE)}
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    args.to.write_text(f'{{"sha256": {json.dumps(files)},\n"entries": [\n{lines}\n]}}\n')
    print(f"{len(entries)} answers, {sum(bool(e['right']) for e in entries)} right")


if __name__ == "__main__":
    main()
