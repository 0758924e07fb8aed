"""Ends a running `llama_decode` from another thread, without a word of Python on the threads that compute."""

import ctypes
import os
from typing import Any


class StopFlag:
    """When `text` has a byte, llama.cpp stops before the next node of a graph, on CPUs. It must outlive the context.

    The callback is the C library's `strlen`: it gives 0, which is false, for an empty string, and 1 for one of one
    byte. Source: `llama_set_abort_callback` in llama.h.
    """

    def __init__(self, llama: Any, context: int) -> None:
        self._llama, self._context = llama, context
        self.text = ctypes.create_string_buffer(2)
        self._look = ctypes.cast(ctypes.CDLL("msvcrt" if os.name == "nt" else None).strlen, llama.ggml_abort_callback)
        self._never = llama.ggml_abort_callback()  # a null pointer

    def watch(self, on: bool) -> None:
        """Whether the next calls of `llama_decode` may be stopped."""
        self._llama.llama_set_abort_callback(self._context, self._look if on else self._never, self.text)
