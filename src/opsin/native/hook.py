"""The one door through which Python looks into a running graph: ggml's `cb_eval`.

The scheduler asks for every node whether it shall stop behind it ("ask"), and after the nodes where the answer was
yes it calls again ("seen"). An exception here, or a False where it should go on, does not stop the encoder: it ends
with code 0 and wrong numbers. So nothing is raised from the callback: what goes wrong is kept, and the caller raises
it when the native call is back.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from opsin.core.errors import Cancelled
from opsin.native.ggml import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opsin.native.library import Library

_HEAVY = frozenset({"MUL_MAT", "MUL_MAT_ID", "FLASH_ATTN_EXT", "CONV_2D", "CONV_3D"})
# A transformer layer has six or seven heavy nodes, so the others get a turn about twice a layer.
_HEAVY_NODES_A_TURN = 4


class Observer(Protocol):
    """Who looks at the nodes."""

    def wants(self, node: Tensor) -> bool:
        """Whether the graph shall stop behind this node, computed and synchronised."""
        ...

    def seen(self, node: Tensor) -> None:
        """This node is computed."""
        ...


class EvalHook:
    """A `cb_eval` callback that can be given to a context for its whole life. Without an observer it says no to all."""

    def __init__(self, lib: Library) -> None:
        self._observer: Observer | None = None
        self._error: BaseException | None = None
        # The library keeps the bare pointer: this object must live longer than what it was given to.
        self.callback: Any = lib.llama.ggml_backend_sched_eval_callback(self._call)

    def _call(self, address: int, ask: bool, _user_data: object) -> bool:
        try:
            observer = self._observer
            if observer is None:
                return not ask
            node = Tensor.from_address(address)
            if ask:
                return observer.wants(node)
            observer.seen(node)
        except BaseException as error:  # noqa: BLE001 - kept, and raised by `observing` behind the native call
            if self._error is None:
                self._error = error
            self._observer = None
            # False ends the graph early. Its numbers are wrong then, which is no harm: the caller never gets them.
            return not ask and not isinstance(error, Cancelled)
        return True

    @contextmanager
    def observing(self, observer: Observer | None) -> Iterator[None]:
        """Look through `observer` while the block runs; raises afterwards what it raised."""
        before, self._observer = self._observer, observer
        self._error = None
        try:
            yield
        finally:
            self._observer = before
            error, self._error = self._error, None
        if error is not None:
            raise error


class Turns:
    """Gives `between` a turn after every few heavy nodes."""

    def __init__(self, lib: Library, between: Callable[[], None]) -> None:
        self._between = between
        self._heavy = heavy_ops(lib)
        self._count = 0

    def wants(self, node: Tensor) -> bool:
        """Every fourth heavy node."""
        if node.op not in self._heavy:
            return False
        self._count += 1
        return self._count % _HEAVY_NODES_A_TURN == 0

    def seen(self, node: Tensor) -> None:  # noqa: ARG002 - the protocol's shape
        """Give the turn."""
        self._between()


def op_names(lib: Library) -> dict[int, str]:
    """The operations of ggml by number."""
    names: dict[int, str] = {}
    # GGML_OP_COUNT is not exported: the table ends with GLU, and asking past its end would read foreign memory.
    for number in range(256):
        name = lib.ggml.ggml_op_name(number).decode()
        names[number] = name
        if name == "GLU":
            break
    return names


def heavy_ops(lib: Library) -> frozenset[int]:
    """Numbers of the operations that take nearly all of the time."""
    return frozenset(number for number, name in op_names(lib).items() if name in _HEAVY)
