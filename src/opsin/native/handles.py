"""Native pointers that are freed once, children before parents."""

from __future__ import annotations

import threading
from collections.abc import Callable

from opsin.core.errors import EngineClosed


class Owned:
    """A native pointer with the function that frees it.

    Closing closes the children first, the youngest of them before the elder; closing twice does no harm. Using a
    closed handle raises EngineClosed instead of handing freed memory to native code.
    """

    __slots__ = ("_children", "_free", "_lock", "_parent", "_pointer", "name")

    def __init__(self, name: str, pointer: int, free: Callable[[int], object], parent: Owned | None = None) -> None:
        if not pointer:
            raise ValueError(f"{name}: a null pointer cannot be owned")
        self.name = name
        self._pointer: int | None = pointer
        self._free = free
        self._parent = parent
        self._children: dict[int, Owned] = {}
        self._lock = threading.Lock()
        if parent is not None:
            parent._adopt(self)  # noqa: SLF001 - of the same class

    def _adopt(self, child: Owned) -> None:
        self.pointer  # noqa: B018 - raises when this handle is closed already
        self._children[id(child)] = child

    @property
    def pointer(self) -> int:
        """The address. Raises EngineClosed after `close`."""
        pointer = self._pointer
        if pointer is None:
            raise EngineClosed(f"The {self.name} was closed already: load the model again.")
        return pointer

    @property
    def closed(self) -> bool:
        """Whether it was freed."""
        return self._pointer is None

    def close(self) -> None:
        """Free the children, then this pointer."""
        with self._lock:
            pointer, self._pointer = self._pointer, None
        if pointer is None:
            return
        for child in reversed(list(self._children.values())):
            child.close()
        self._children.clear()
        self._free(pointer)
        parent, self._parent = self._parent, None
        if parent is not None:
            parent._children.pop(id(self), None)  # noqa: SLF001 - of the same class
