"""Muon for the weight matrices, AdamW for everything else, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration (K. Jordan, "Muon", 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push every singular value of [n, rows, columns] matrices towards one."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; fused matrices are split into `parts` first."""

    def __init__(self, params: list[dict[str, object]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": 0.0, "parts": 1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update from the gradients at hand."""
        for group in self.param_groups:
            lr, momentum, parts = group["lr"], group["momentum"], group["parts"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(state["mean"], momentum)
                rows, columns = p.shape[0] // parts, p.shape[1]
                update = orthogonalise(update.view(parts, rows, columns)).reshape(p.shape)
                p.mul_(1 - lr * group["decay"])
                p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(rows, columns)))


def split_parameters(module: nn.Module) -> tuple[list[dict[str, object]], list[nn.Parameter]]:
    """(Muon groups, AdamW parameters): matrices inside the network against everything else."""
    by_parts: dict[int, list[nn.Parameter]] = {}
    other = []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        matrix = p.ndim == 2 and not any(word in name for word in ("embed", "head", "position"))
        if matrix:
            parts = 3 if "qkv" in name else 2 if "gate_up" in name else 1
            by_parts.setdefault(parts, []).append(p)
        else:
            other.append(p)
    return [{"params": ps, "parts": n} for n, ps in by_parts.items()], other


def cosine(step: int, total: int, warmup: int = 50, floor: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    at = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * at))
