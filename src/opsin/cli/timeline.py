"""The timeline under an answer: a bar a stage, and what went through it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from opsin.core.answer import Answer
    from opsin.core.placement import BackendShare, Placement

BAR = 32
LABELS = {"load": "load model", "encode": "vision encode"}
ORDER = (
    "load", "queue", "fetch", "image_decode", "preprocess", "encode", "image_prefill", "text_prefill", "decode",
    "sample", "detokenize", "other",
)  # fmt: skip
OF_IMAGES = {"image_decode", "preprocess", "encode", "image_prefill"}
OF_TEXT = {"text_prefill", "decode"}


def timeline(answer: Answer, placement: Placement | None) -> Table:
    """One row for each stage that took time; bars start where the stage began, if stages ran one after another."""
    stages = asdict(answer.stages)
    total = max(stages["total_ms"], 1e-9)
    always = OF_TEXT | (OF_IMAGES if answer.images else set())
    notes = _notes(answer, placement)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("stage", style="bold", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("", width=BAR, no_wrap=True)
    table.add_column("", overflow="fold")
    before = 0.0
    for name in ORDER:
        ms = stages[f"{name}_ms"]
        if ms >= 0.05 or name in always:
            length = max(1, round(ms / total * BAR))
            start = min(round(before / total * BAR), BAR - length)
            label = LABELS.get(name, name.replace("_", " "))
            bar = Text(" " * start + "█" * length, style="cyan")
            table.add_row(label, f"{ms:,.1f}", bar, Text(notes.get(name, "")))
        before += ms
    counts = f"{answer.usage.prompt_tokens} prompt + {answer.usage.completion_tokens} answer tokens"
    table.add_row("total", f"{total:,.1f}", "", Text(counts))
    return table


def _notes(answer: Answer, placement: Placement | None) -> dict[str, str]:
    usage, stages = answer.usage, answer.stages
    encoder, language_model = (placement.encoder, placement.language_model) if placement else ({}, {})
    known = answer.images and all(image.cached for image in answer.images)
    where = ", remembered: the encoder did not run" if known else _where(encoder)
    sizes = {f"{i.width}×{i.height} → {i.resized_width}×{i.resized_height}" for i in answer.images}
    return {
        "preprocess": ", ".join(sorted(sizes)),
        "encode": f"{usage.image_tokens} image tokens{where}",
        "image_prefill": _rate(usage.image_tokens, stages.image_prefill_ms),
        "text_prefill": _rate(usage.prompt_tokens - usage.image_tokens, stages.text_prefill_ms),
        "decode": _rate(usage.completion_tokens, answer.timings.predicted_ms) + _where(language_model),
    }


def _rate(tokens: int, ms: float) -> str:
    rate = f", {tokens / ms * 1e3:,.0f} token/s" if ms > 0 else ""
    return f"{tokens} tokens{rate}" if tokens else ""


def _where(shares: dict[str, BackendShare]) -> str:
    parts = [f"{share.share_of_ops:.0%} {name}" for name, share in shares.items() if share.share_of_ops >= 0.005]
    return f", ran on {', '.join(parts)}" if parts else ""
