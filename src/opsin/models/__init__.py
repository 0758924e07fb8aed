"""Model files: what they are, where they come from, and which pair is meant.

Refuses to know llama.cpp: files are read by their GGUF header alone. Downloads are in `opsin.models.hub`.
"""

from opsin.models.gguf import GgufInfo, info_of, read_info
from opsin.models.pairing import Pair, check_pair, family_warning, find_projector
from opsin.models.resolve import demo_pair, list_models, locate, resolve

__all__ = [
    "GgufInfo",
    "Pair",
    "check_pair",
    "demo_pair",
    "family_warning",
    "find_projector",
    "info_of",
    "list_models",
    "locate",
    "read_info",
    "resolve",
]
