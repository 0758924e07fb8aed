"""Model files: what they are, where they come from, and which pair is meant.

Refuses to know llama.cpp: files are read by their GGUF header alone, and nothing here loads a model. What needs heavy
libraries or is rarely wanted is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

from opsin.models.gguf import GgufHeader, GgufInfo, TensorHead, info_of, read_header, read_info
from opsin.models.naming import parts_of
from opsin.models.pairing import Pair, check_pair, family_warning, find_projector
from opsin.models.resolve import ListedModel, demo_pair, list_models, locate, resolve

if TYPE_CHECKING:
    from opsin.models.hub import pull

__all__ = [
    "GgufHeader",
    "GgufInfo",
    "ListedModel",
    "Pair",
    "TensorHead",
    "check_pair",
    "demo_pair",
    "family_warning",
    "find_projector",
    "info_of",
    "list_models",
    "locate",
    "parts_of",
    "pull",
    "read_header",
    "read_info",
    "resolve",
]

_HOMES = {"pull": "opsin.models.hub"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'opsin.models' has no attribute {name!r}")
