"""Model files: what they are, where they come from, and which pair is meant.

Refuses to know llama.cpp: files are read by their GGUF header alone. Downloads are in `opsin.models.hub`.
"""

from opsin.models.gguf import read_info
from opsin.models.pairing import Pair
from opsin.models.resolve import locate, resolve

__all__ = ["Pair", "locate", "read_info", "resolve"]
