"""Who wants to know which images are in native code, and how long a call takes, hands the engine a `Watch`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Watch = Callable[[tuple[str, ...]], AbstractContextManager[None]]
"""Called with the `sha256` of the images that a native call works on (none: it works on text), entered before the call
and left after it; calls may be nested, and come from the engine's thread and from those that preprocess images."""

_NOTHING = nullcontext()


def unwatched(_: tuple[str, ...]) -> AbstractContextManager[None]:
    """Nobody wants to know."""
    return _NOTHING
