"""Model files: what they are, where they come from, and which pair is meant.

Refuses to know llama.cpp: files are read by their GGUF header alone, and nothing here loads a model. What needs heavy
libraries or is rarely wanted is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

from opsin.models.gguf_info import GgufInfo, read_info
from opsin.models.pair import Pair
from opsin.models.pairing import check_pair, find_projector
from opsin.models.resolve import demo_pair, locate, resolve

if TYPE_CHECKING:
    from opsin.models.hub import pull
    from opsin.models.listing import list_models

__all__ = [
    "GgufInfo",
    "Pair",
    "check_pair",
    "demo_pair",
    "find_projector",
    "list_models",
    "locate",
    "pull",
    "read_info",
    "resolve",
]

_HOMES = {
    "list_models": "opsin.models.listing",
    "pull": "opsin.models.hub",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'opsin.models' has no attribute {name!r}")
