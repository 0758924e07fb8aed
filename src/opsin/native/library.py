"""The native libraries, loaded once: log first, then the ABI check, then the backends."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opsin.core.errors import NativeMismatch
from opsin.native import abi, ggml, logs


@dataclass(frozen=True, slots=True)
class Library:
    """The two binding modules, the ggml functions they leave out, and where libllama lies.

    `pause` is OpenMP's `omp_pause_resource_all`, None in a build without it.
    """

    llama: Any
    mtmd: Any
    ggml: Any
    path: Path
    pause: Any = None


_lock = threading.Lock()


def library() -> Library:
    """The libraries; the first call loads them. Raises NativeMismatch. Any thread."""
    with _lock:
        return _load()


@cache
def _load() -> Library:
    # Without it ggml starts a debugger where it aborts, which prints on standard output.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        import llama_cpp
        from llama_cpp import _ggml
        from llama_cpp import llama_cpp as llama
        from llama_cpp import mtmd_cpp as mtmd
        from llama_cpp._ctypes_extensions import load_shared_library
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise NativeMismatch(f"llama-cpp-python cannot be loaded ({error}): {abi.ADVICE}.") from error
    logs.install(llama, mtmd)
    native = llama._lib  # noqa: SLF001 - the loaded library has no public name
    libraries = [native, _ggml.libggml]
    # A static build has everything in the two above; a symbol that is missing is told by the check below.
    with contextlib.suppress(FileNotFoundError, RuntimeError):
        libraries.append(load_shared_library("ggml-base", _ggml.libggml_base_path))
    functions, missing = ggml.bind(libraries)
    abi.check(llama_cpp.__version__, llama, mtmd, functions, missing)
    llama.llama_backend_init()
    # Looked for in what the library was linked with, too: a wheel's OpenMP has a name of its own.
    pause = next((found for one in libraries if (found := getattr(one, "omp_pause_resource_all", None))), None)
    return Library(llama, mtmd, functions, Path(native._name), pause)  # noqa: SLF001 - as above
