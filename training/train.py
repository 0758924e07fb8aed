"""Train the demo model: `python -m training.train --stage vision|language|joint|all --out DIR`.

Every stage writes DIR/<stage>.pt as it goes and continues from it when started again. The scenes
must have been rendered first: `python -m training.data --out DIR`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training import stage_language, stage_vision
from training.align import align
from training.export import export
from training.model import Config, Llava
from training.tokenizer import Tokenizer

SEED = 1
# Steps, pictures a step and peak learning rate of each stage.
VISION = (1000, 128, 3e-3)
LANGUAGE = (500, 16, 2.5e-3)
JOINT = (1120, 16, 2e-3)


def start_model(out: Path, tokenizer: Tokenizer, stage: str) -> Llava:
    """A fresh model that takes over what the stage before has learned."""
    torch.manual_seed(SEED)
    model = Llava(Config(vocab=len(tokenizer)))
    if stage == "language":
        saved = torch.load(out / "vision.pt")["model"]
        for part in ("vision", "heads"):
            weights = {k[len(part) + 1 :]: v for k, v in saved.items() if k.startswith(part + ".")}
            getattr(model, part).load_state_dict(weights)
        align(model, tokenizer)
    elif stage == "joint":
        model.load_state_dict(torch.load(out / "language.pt")["model"])
    return model


def run_stage(stage: str, out: Path, steps: int | None, batch: int | None, lr: float | None) -> None:
    """Run one stage with the planned figures or those given."""
    tokenizer = Tokenizer()
    plan = {"vision": VISION, "language": LANGUAGE, "joint": JOINT}[stage]
    steps, batch, lr = steps or plan[0], batch or plan[1], lr or plan[2]
    if stage == "vision":
        stage_vision.run(out, Config(vocab=len(tokenizer)), steps, batch, lr, SEED)
        return
    joint = stage == "joint"
    model = start_model(out, tokenizer, stage)
    seed = SEED + 1 + joint
    stage_language.run(out, model, tokenizer, joint, steps, batch, lr, seed)
    figures = stage_language.validate(model, tokenizer, out / "scenes", scenes=400, wrong=40)
    print(stage, "end", " ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
    export(model.eval(), tokenizer, out / "gguf" / stage)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("vision", "language", "joint", "all"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stages = ("vision", "language", "joint") if args.stage == "all" else (args.stage,)
    for stage in stages:
        run_stage(stage, args.out, args.steps, args.batch, args.lr)


if __name__ == "__main__":
    main()
