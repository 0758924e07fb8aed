"""Native pointers that are freed once, children before parents."""

from __future__ import annotations

import threading
from collections.abc import Callable

from opsin.core.errors import EngineClosed


class Owned:
    """A native pointer with the function that frees it, and the handles that must be freed before it.

    Using a closed handle raises EngineClosed instead of giving freed memory to native code.
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
            parent.pointer  # noqa: B018 - raises when it is closed already
            parent._children[id(self)] = self  # noqa: SLF001 - of the same class

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
        """Free the children, the youngest first, then this pointer. Closing twice does no harm."""
        with self._lock:
            pointer, self._pointer = self._pointer, None
        if pointer is None:
            return
        for child in reversed(list(self._children.values())):
            child.close()
        self._free(pointer)
        if self._parent is not None:
            self._parent._children.pop(id(self), None)  # noqa: SLF001 - of the same class
