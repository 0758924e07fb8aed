"""What is worth remembering: image embeddings, and which sequence holds which cells of the KV cache.

Pure Python. Refuses to know any model runtime, and to decide when something is used: the engine does.
"""

from opsin.cache.disk import DiskStore, default_folder
from opsin.cache.memory import EmbeddingCache, ImageUnit, Prefix, PrefixIndex, Unit, salted, units_of

__all__ = [
    "DiskStore",
    "EmbeddingCache",
    "ImageUnit",
    "Prefix",
    "PrefixIndex",
    "Unit",
    "default_folder",
    "salted",
    "units_of",
]
