"""The timeline under an answer: a bar a stage, and what went through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from opsin.core.answer import Answer
    from opsin.core.placement import BackendShare, Placement

BAR = 32
ROWS = (
    ("load_ms", "load model"),
    ("queue_ms", "queue"),
    ("fetch_ms", "fetch"),
    ("image_decode_ms", "image decode"),
    ("preprocess_ms", "preprocess"),
    ("encode_ms", "vision encode"),
    ("image_prefill_ms", "image prefill"),
    ("text_prefill_ms", "text prefill"),
    ("decode_ms", "decode"),
    ("sample_ms", "sample"),
    ("detokenize_ms", "detokenize"),
    ("other_ms", "other"),
)
ALWAYS = {"image_decode_ms", "preprocess_ms", "encode_ms", "image_prefill_ms", "text_prefill_ms", "decode_ms"}


def timeline(answer: Answer, placement: Placement | None) -> Table:
    """One row a stage that took time; bars stand where the stage began, if the stages ran one after another."""
    stages = answer.stages.as_dict()
    total = max(stages["total_ms"], 1e-9)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("stage", style="bold", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("", width=BAR, no_wrap=True)
    table.add_column("", overflow="fold")
    before = 0.0
    for key, label in ROWS:
        ms = stages[key]
        if ms >= 0.05 or (key in ALWAYS and (answer.images or key in {"text_prefill_ms", "decode_ms"})):
            table.add_row(label, f"{ms:,.1f}", _bar(before, ms, total), Text(_note(key, answer, placement)))
        before += ms
    table.add_row("total", f"{total:,.1f}", "", Text(_total_note(answer)))
    return table


def _bar(before: float, ms: float, total: float) -> Text:
    start = round(before / total * BAR)
    length = max(1, round(ms / total * BAR))
    start = min(start, BAR - length)
    return Text(" " * start + "█" * length, style="cyan")


def _note(key: str, answer: Answer, placement: Placement | None) -> str:
    usage, stages = answer.usage, answer.stages
    if key == "preprocess_ms" and answer.images:
        sizes = {f"{i.width}×{i.height} → {i.resized_width}×{i.resized_height}" for i in answer.images}
        return ", ".join(sorted(sizes))
    if key == "encode_ms":
        remembered = answer.images and all(image.cached for image in answer.images)
        where = (
            ", remembered: the encoder did not run" if remembered else _where(placement.encoder if placement else {})
        )
        return f"{usage.image_tokens} image tokens{where}"
    if key == "image_prefill_ms":
        return _rate(usage.image_tokens, stages.image_prefill_ms)
    if key == "text_prefill_ms":
        return _rate(usage.prompt_tokens - usage.image_tokens, stages.text_prefill_ms)
    if key == "decode_ms":
        rate = _rate(usage.completion_tokens, answer.timings.predicted_ms)
        return f"{rate}{_where(placement.language_model if placement else {})}"
    return ""


def _rate(tokens: int, ms: float) -> str:
    if not tokens:
        return ""
    return f"{tokens} tokens" + (f", {tokens / ms * 1e3:,.0f} token/s" if ms > 0 else "")


def _where(shares: dict[str, BackendShare]) -> str:
    parts = [f"{share.share_of_ops:.0%} {name}" for name, share in shares.items() if share.share_of_ops >= 0.005]
    return f", ran on {', '.join(parts)}" if parts else ""


def _total_note(answer: Answer) -> str:
    usage = answer.usage
    return f"{usage.prompt_tokens} prompt + {usage.completion_tokens} answer tokens"
