"""Ask images questions on your own hardware, fast, and see where every millisecond went."""

import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.api import Mapped, Opsin, ask, map  # noqa: A004
    from opsin.engine import Engine
    from opsin.prompt import Message

__version__ = "0.2.0"
BEGAN = time.perf_counter()  # when the first of Opsin was imported
__all__ = ["Engine", "Mapped", "Message", "Opsin", "__version__", "ask", "map"]

_HOMES = {"Engine": "opsin.engine", "Message": "opsin.prompt"} | dict.fromkeys(
    ("Mapped", "Opsin", "ask", "map"), "opsin.api"
)


def __getattr__(name: str) -> Any:
    # Public names load their rooms when they are first used, so that `opsin --help` and `import opsin` stay quick.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'opsin' has no attribute {name!r}")
