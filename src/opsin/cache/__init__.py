"""What is worth remembering: image embeddings, and which sequence holds which cells of the KV cache.

Pure Python. Refuses to know any model runtime, and to decide when something is used: the engine does.
"""

from opsin.cache.disk import DiskStore, default_folder
from opsin.cache.embeddings import EmbeddingCache, salted
from opsin.cache.kv_cache import Prefix, units_of

__all__ = ["DiskStore", "EmbeddingCache", "Prefix", "default_folder", "salted", "units_of"]
