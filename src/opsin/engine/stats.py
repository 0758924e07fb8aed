"""What the engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Snapshot:
    """Counts since the start, and what is so now; seconds and tokens.

    `prompt_tokens` are those of all prompts that were admitted, `prefix_hits` the part found in the KV cache. An image
    chunk whose rows are to be decoded was either encoded for it (`encodes`) or remembered (`image_hits`).
    """

    running: int = 0
    waiting: int = 0
    idle_prefixes: int = 0
    cells_used: int = 0
    finished: int = 0
    failed: int = 0
    guard_stops: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prefix_hits: int = 0
    generated_tokens: int = 0
    image_hits: int = 0
    encodes: int = 0
    encode_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    draft_tokens: int = 0
    draft_accepted: int = 0
    prefill_tokens: int = 0
