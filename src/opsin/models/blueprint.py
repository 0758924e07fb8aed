"""What the two files of a random-weight pair hold: metadata keys and tensors, as llama.cpp's loaders ask for them.

Each family has its own rows in `blueprint_text` and `blueprint_vision`; this is the door to them.
"""

from __future__ import annotations

from opsin.models.blueprint_text import llm_metadata, llm_tensors
from opsin.models.blueprint_vision import clip_metadata, clip_tensors
from opsin.models.shapes import Family, PairShape

_ARCHITECTURES: dict[Family, str] = {"llava": "llama", "qwen2vl": "qwen2vl", "gemma3": "gemma3"}


def llm_architecture(shape: PairShape) -> str:
    """What llama.cpp calls the language model of a shape."""
    return _ARCHITECTURES[shape.family]


__all__ = ["clip_metadata", "clip_tensors", "llm_architecture", "llm_metadata", "llm_tensors"]
