"""Stage 1: the vision tower alone learns to name what is in every grid cell and on every sign."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.data import N_SLOTS, ROW_LABEL, open_split
from training.model import Config, Vision, VisionHeads
from training.optim import Muon, cosine, split_parameters

CELL_OF_PATCH = torch.tensor([3 * (y // 2) + x // 2 for y in range(6) for x in range(6)])
ROW_OF_PATCH = CELL_OF_PATCH // 3
LINE_OF_PATCH = torch.tensor([y for y in range(6) for _ in range(6)])
SLOT_OF_PATCH = torch.tensor([x for _ in range(6) for x in range(6)])
PLACE_WEIGHT = 0.2


class Labels:
    """One batch of labels, unpacked; cell arrays are [B, 3, 3] so that they turn with the picture."""

    def __init__(self, raw: Tensor) -> None:
        raw = raw.long()
        self.shape, self.colour, self.size = (raw[:, i : i + 9].view(-1, 3, 3) for i in (0, 9, 18))
        self.chars, self.row = raw[:, 27:ROW_LABEL], raw[:, ROW_LABEL]

    def joined(self, other: Labels) -> Labels:
        """These labels with another batch's behind them."""
        for name in vars(self):
            setattr(self, name, torch.cat((getattr(self, name), getattr(other, name))))
        return self


def turned(pixels: Tensor, labels: Labels, op: int) -> Tensor:
    """Turn or mirror the pictures without text by one of the square's eight symmetries."""
    plain = labels.row < 0

    def turn(x: Tensor) -> Tensor:
        x = torch.rot90(x, op % 4, (1, 2))
        return x.flip(2) if op >= 4 else x

    pixels = pixels.clone()
    pixels[plain] = turn(pixels[plain])
    for name in ("shape", "colour", "size"):
        cells = getattr(labels, name).clone()
        cells[plain] = turn(cells[plain])
        setattr(labels, name, cells)
    return pixels


def augmented(pixels: Tensor, labels: Labels, generator: np.random.Generator) -> Tensor:
    """Symmetries, then a little gain and offset a channel."""
    pixels = turned(pixels, labels, int(generator.integers(8))).float()
    b = len(pixels)
    gain = torch.from_numpy(generator.uniform(0.94, 1.04, (b, 1, 1, 3)).astype(np.float32))
    return (pixels * gain).clamp_(0, 255)


def losses(outputs: tuple[Tensor, ...], labels: Labels) -> Tensor:
    """Cross-entropy of all read-outs, weighted by what is hard to learn."""
    shape, colour, size, chars, line, column = outputs
    b = len(shape)
    target = {
        name: getattr(labels, name).view(b, 9)[:, CELL_OF_PATCH].flatten() for name in ("shape", "colour", "size")
    }
    total = F.cross_entropy(shape.flatten(0, 1), target["shape"])
    for place, at in ((line, LINE_OF_PATCH), (column, SLOT_OF_PATCH)):
        total = total + PLACE_WEIGHT * F.cross_entropy(place.flatten(0, 1), at.repeat(b))
    full = (target["colour"] >= 0).nonzero().flatten()
    if len(full):
        total = total + 0.5 * F.cross_entropy(colour.flatten(0, 1)[full], target["colour"][full])
        total = total + 0.2 * F.cross_entropy(size.flatten(0, 1)[full], target["size"][full])
    wanted = (labels.row[:, None] == ROW_OF_PATCH) & (SLOT_OF_PATCH < N_SLOTS)
    if wanted.any():
        picture, patch = wanted.nonzero(as_tuple=True)
        target_char = labels.chars[picture, SLOT_OF_PATCH[patch]]
        total = total + F.cross_entropy(chars[picture, patch], target_char)
    return total


@torch.no_grad()
def accuracy(vision: Vision, heads: VisionHeads, pictures: np.ndarray, raw: np.ndarray) -> str:
    """Share of objects named right (shape and colour), of pictures without a slip, of signs read."""
    right: dict[str, list[bool]] = {"object": [], "size": [], "scene": [], "number": [], "word": []}
    for i in range(0, len(pictures), 250):
        labels = Labels(torch.from_numpy(raw[i : i + 250]))
        outputs = heads(vision(torch.from_numpy(pictures[i : i + 250])))
        per_cell = [x.log_softmax(-1).view(-1, 3, 2, 3, 2, x.shape[-1]).mean((2, 4)).argmax(-1) for x in outputs[:3]]
        there = labels.colour >= 0
        good = (per_cell[0] == labels.shape) & (~there | (per_cell[1] == labels.colour))
        right["object"] += good[there].tolist()
        right["size"] += (per_cell[2] == labels.size)[there].tolist()
        right["scene"] += good.flatten(1).all(1).tolist()
        chars = outputs[3].log_softmax(-1).view(-1, 3, 2, 6, outputs[3].shape[-1]).mean(2)
        for j in (labels.row >= 0).nonzero().flatten().tolist():
            said = chars[j, labels.row[j], :N_SLOTS].argmax(-1)
            kind = "number" if labels.chars[j, 0] > 26 else "word"
            right[kind].append(bool((said == labels.chars[j]).all()))
    return " ".join(f"{k} {np.mean(v):.4f}" for k, v in right.items() if v)


def run(out: Path, config: Config, steps: int, batch: int, lr: float, seed: int = 1) -> None:
    """Train the tower; writes vision.pt and goes on from it where it exists."""
    torch.manual_seed(seed)
    vision, heads = Vision(config), VisionHeads(config)
    for block in vision.blocks:
        torch.nn.init.zeros_(block.out.weight)
        torch.nn.init.zeros_(block.down.weight)
    both = torch.nn.ModuleDict({"vision": vision, "heads": heads})
    groups, other = split_parameters(both)
    muon = Muon(groups, lr=lr)
    adam = torch.optim.AdamW(other, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    path = out / "vision.pt"
    first = 0
    if path.exists():
        state = torch.load(path)
        both.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        first = state["step"]
    val_pictures, val_labels = open_split(out / "scenes", "val")
    pictures, raw = open_split(out / "scenes", "train")
    compiled = vision
    mean, began = 0.0, time.time()
    for step in range(first, steps):
        if step % 500 == 0:
            pictures, raw = open_split(out / "scenes", "train")
        generator = np.random.default_rng((seed, step))
        chosen = np.sort(generator.integers(0, len(raw), batch))
        labels = Labels(torch.from_numpy(raw[chosen]))
        pixels = augmented(torch.from_numpy(pictures[chosen]), labels, generator)
        loss = losses(heads(compiled(pixels)), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimiser in (muon, adam):
            for group in optimiser.param_groups:
                group["lr"] = lr * cosine(step, steps)
            optimiser.step()
            optimiser.zero_grad()
        mean += (loss.item() - mean) / 50 if step > first + 20 else loss.item() - mean
        if step % 25 == 0:
            rate = (step - first + 1) * batch / (time.time() - began)
            print(f"vision {step} loss {mean:.4f} {rate:.0f} pictures/s", flush=True)
        if (step + 1) % 125 == 0 or step + 1 == steps:
            print(f"vision {step + 1} val", accuracy(vision, heads, val_pictures[:1000], val_labels[:1000]), flush=True)
            state = {"model": both.state_dict(), "muon": muon.state_dict(),
                     "adam": adam.state_dict(), "step": step + 1}  # fmt: skip
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
