"""Stages 2 and 3: the projector and text model behind a frozen tower, then everything together."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.batches import Rows, stream
from training.data import ROW_LABEL, open_split
from training.exam import label, paper, shares
from training.model import Llava
from training.optim import Muon, cosine, split_parameters
from training.questions import NUMBERS, judge
from training.stage_vision import Labels, augmented, losses
from training.tokenizer import SPACE, Tokenizer

GAIN = (0.94, 1.04)
BLIND_WEIGHT = 0.05  # of the rows without a picture, in the joint stage
DECISION_WEIGHT = 3.0  # of the words that close an answer's reasons: yes, no, a number
EXTRA = 80  # pictures a joint step shows the tower alone: they cost little and it needs many
HEADS_WEIGHT = 0.5  # of the tower's own loss while everything trains together


def shaded(pixels: np.ndarray, generator: np.random.Generator) -> Tensor:
    """A little gain a channel; the pictures stay as they lie, since questions name places."""
    gain = generator.uniform(*GAIN, (len(pixels), 1, 1, 3)).astype(np.float32)
    return torch.from_numpy(pixels * gain).clamp_(0, 255)


class Learner:
    """One stage's model, optimisers and schedule; saved whole, so that a run can go on."""

    def __init__(self, model: Llava, lr: float, joint: bool, vision_lr: float = 0.75) -> None:
        self.model, self.lr, self.joint = model, lr, joint
        tower = (model.vision, model.heads)
        for module in tower:
            module.requires_grad_(joint)
        tokenizer = Tokenizer()
        self.token_weights = torch.ones(len(tokenizer))
        for word in ("yes", "no", *NUMBERS):
            self.token_weights[tokenizer.ids[SPACE + word]] = DECISION_WEIGHT
        self.optimisers: list[torch.optim.Optimizer] = []
        self.factors: list[float] = []
        rest = nn.ModuleDict({"mm0": model.mm0, "mm2": model.mm2, "text": model.text})
        self._add(rest, 1.0)
        if joint:
            self._add(nn.ModuleDict({"vision": model.vision, "heads": model.heads}), vision_lr)

    def _add(self, module: nn.Module, factor: float) -> None:
        groups, other = split_parameters(module)
        adam = torch.optim.AdamW(other, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.optimisers += [Muon(groups, lr=self.lr), adam]
        self.factors += [factor, factor]

    def _answer_loss(self, features: Tensor | None, rows: Rows, head: Tensor) -> Tensor:
        tokens, positions, segments, targets = (
            torch.from_numpy(x).long() for x in (rows.tokens, rows.positions, rows.segments, rows.targets)
        )
        hidden = self.model.answer_hidden(features, head, tokens, positions, segments)
        targets = targets.view(hidden.shape[:2])
        learned = targets >= 0
        logits = self.model.text.logits(hidden[learned])
        return F.cross_entropy(logits, targets[learned], weight=self.token_weights)

    def loss(self, pixels: Tensor, labels: Labels, rows: Rows, head: Tensor) -> Tensor:
        """Of the answers; in the joint stage of the tower's labels too.

        The first pictures are the rows' own; any further ones only teach the tower.
        """
        with torch.set_grad_enabled(self.joint):
            features = self.model.vision(pixels)
        total = self._answer_loss(features[: len(rows.scenes)], rows, head)
        if self.joint:
            total = total + HEADS_WEIGHT * losses(self.model.heads(features), labels)
            if rows.blind:
                total = total + BLIND_WEIGHT * self._answer_loss(None, rows.blind, head)
        return total

    def step(self, loss: Tensor, factor: float) -> None:
        """Update everything; `factor` scales the learning rates."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        for optimiser, part in zip(self.optimisers, self.factors, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = self.lr * part * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def save(self, path: Path, step: int) -> None:
        """Write weights, optimisers and the step reached."""
        state = {"model": self.model.state_dict(), "step": step,
                 "optimisers": [o.state_dict() for o in self.optimisers]}  # fmt: skip
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def restore(self, path: Path) -> int:
        """Take up a saved run; gives the step it had reached."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        return int(state["step"])


@torch.no_grad()
def answers(model: Llava, tokenizer: Tokenizer, pictures: np.ndarray, questions: list[str]) -> list[str]:
    """Free-running greedy answers, one question a picture."""
    head = torch.tensor([tokenizer.bos, tokenizer.user])
    out = []
    for i in range(0, len(questions), 256):
        features = model.vision(torch.from_numpy(np.ascontiguousarray(pictures[i : i + 256])))
        prompts = [tokenizer.prompt(q) for q in questions[i : i + 256]]
        out += model.generate(features, head, prompts, tokenizer.eos)
    return [tokenizer.decode(ids) for ids in out]


def validate(
    model: Llava, tokenizer: Tokenizer, folder: Path, split: str = "val", scenes: int = 100,
    wrong: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Share of right free-running answers a kind; prints the first `wrong` wrong ones."""
    asked = paper(split, scenes)
    pictures, _ = open_split(folder, split)
    at = [index for index, _, _ in asked]
    said = answers(model.eval(), tokenizer, pictures[at], [q.text for _, _, q in asked])
    model.train()
    results = []
    for (index, scene, question), answer in zip(asked, said, strict=True):
        good = judge(question, answer)
        results.append((label(question, scene), good))
        if not good and wrong:
            wrong -= 1
            print("  WRONG", index, question.text, "|", answer, "|", question.answer)
    return {kind: figure["share"] for kind, figure in shares(results).items()}


def run(
    out: Path, model: Llava, tokenizer: Tokenizer, joint: bool, steps: int, batch: int, lr: float,
    seed: int, every: int = 150,
) -> None:  # fmt: skip
    """Train one stage; writes language.pt or joint.pt and goes on from it where it exists."""
    stage = "joint" if joint else "language"
    learner = Learner(model, lr, joint)
    path = out / f"{stage}.pt"
    first = learner.restore(path) if path.exists() else 0
    pictures, raw = open_split(out / "scenes", "train")
    signs = np.flatnonzero(raw[:, ROW_LABEL] >= 0)
    head = torch.tensor([tokenizer.bos, tokenizer.user])
    mean, began = 0.0, time.time()
    for step, rows in enumerate(stream(len(raw), batch, first, steps, seed), first):
        generator = np.random.default_rng((seed, step))
        pixels, labels = shaded(pictures[rows.scenes], generator), Labels(torch.from_numpy(raw[rows.scenes]))
        if joint:
            more = generator.integers(0, len(raw), EXTRA)
            more[: EXTRA // 3] = generator.choice(signs, EXTRA // 3)  # reading is what it learns last
            more.sort()
            extra = Labels(torch.from_numpy(raw[more]))
            turned_pixels = augmented(torch.from_numpy(pictures[more]), extra, generator)
            pixels, labels = torch.cat((pixels, turned_pixels)), labels.joined(extra)
        loss = learner.loss(pixels, labels, rows, head)
        learner.step(loss, cosine(step, steps))
        mean += (loss.item() - mean) / (50 if step > first + 20 else 1)
        if step % 25 == 0:
            rate = (step - first + 1) * batch / (time.time() - began)
            print(f"{stage} {step} loss {mean:.4f} {rate:.1f} pictures/s", flush=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            learner.save(path, step + 1)
            figures = validate(model, tokenizer, out / "scenes", scenes=60)
            print(f"{stage} {step + 1} val", " ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
