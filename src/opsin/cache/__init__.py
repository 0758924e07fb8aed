"""What is worth remembering: embeddings of pictures, and which sequence holds which beginning of a prompt.

Pure Python. Refuses to know any model runtime, and to decide when something is used: the engine does.
"""

from opsin.cache.cells import CellBook
from opsin.cache.disk import DiskStore, default_folder
from opsin.cache.pictures import PictureCache, salted
from opsin.cache.prefix import NoPrefixes, Prefix, Prefixes, PrefixIndex
from opsin.cache.units import ImageUnit, Unit, shared_units, units_of

__all__ = [
    "CellBook",
    "DiskStore",
    "ImageUnit",
    "NoPrefixes",
    "PictureCache",
    "Prefix",
    "PrefixIndex",
    "Prefixes",
    "Unit",
    "default_folder",
    "salted",
    "shared_units",
    "units_of",
]
