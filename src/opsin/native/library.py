"""The native libraries, loaded once and compared with what this code was written for.

The ctypes mirror of llama-cpp-python changes between patch releases, and a struct that lost or gained a field is not an
error but a crash later. Importing the bindings fails where the library lacks a function; the rest is compared here.
"""

import contextlib
import ctypes
import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opsin.core.errors import NativeMismatch
from opsin.native import logs
from opsin.native.ggml import Tensor, bind

VERSION = "0.3.36"
LIBRARY = "0.5.0-dev"  # what the llama.cpp inside it calls itself
ADVICE = f"run: pip install --force-reinstall llama-cpp-python=={VERSION}"

# Defaults in the middle and at the end of each struct: any field inserted or removed shifts at least one of them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama_model_default_params": {"n_gpu_layers": -1, "split_mode": 1, "use_extra_bufts": True, "load_mtp": False},
    "llama_context_default_params": {"n_batch": 2048, "yarn_beta_slow": -1.0, "swa_full": True, "ctx_other": None},
    "llama_sampler_chain_default_params": {"no_perf": True},
    "mtmd_context_params_default": {"n_threads": 4, "batch_max_tokens": 1024, "progress_callback_user_data": None},
}
_OBJECT_SIZE = 32  # bytes of the ggml_object in front of each tensor (ggml.c)


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

        native = llama._lib  # noqa: SLF001 - the loaded library has no public name
        libraries = [native, _ggml.libggml]
        with contextlib.suppress(FileNotFoundError, RuntimeError):  # a static build has everything in the two above
            libraries.append(load_shared_library("ggml-base", _ggml.libggml_base_path))
        functions = bind(libraries)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise NativeMismatch(f"llama-cpp-python cannot be loaded ({error}): {ADVICE}.") from error
    logs.install(llama, mtmd)
    check(llama_cpp.__version__, llama, mtmd, functions)
    llama.llama_backend_init()
    # Looked for in what the library was linked with, too: a wheel's OpenMP has a name of its own.
    pause = next((found for one in libraries if (found := getattr(one, "omp_pause_resource_all", None))), None)
    return Library(llama, mtmd, functions, Path(native._name), pause)  # noqa: SLF001 - as above


def check(version: str, llama: Any, mtmd: Any, ggml: Any) -> None:
    """Compare the bindings, the library behind them and their structs with what this code was written for.

    Raises NativeMismatch with the way to fix it.
    """
    if version != VERSION:
        wrong = f"llama-cpp-python {version} is installed, but Opsin was built for exactly {VERSION}"
    elif (library := llama.llama_version().decode()) != LIBRARY:
        wrong = f"The llama.cpp library calls itself {library}, not {LIBRARY} (is LLAMA_CPP_LIB_PATH set?)"
    elif fields := _shifted(llama, mtmd, ggml):
        wrong = f"Native structs are not laid out as Opsin expects ({', '.join(fields)})"
    else:
        return
    raise NativeMismatch(f"{wrong}: {ADVICE}.")


def _shifted(llama: Any, mtmd: Any, ggml: Any) -> list[str]:
    found = []
    for maker, fields in DEFAULTS.items():
        struct = getattr(mtmd if maker.startswith("mtmd") else llama, maker)()
        found += [f"{maker}: {name}" for name, value in fields.items() if getattr(struct, name, "none") != value]
    if ggml.ggml_tensor_overhead() != _OBJECT_SIZE + ctypes.sizeof(Tensor):
        found.append("ggml_tensor")
    return found
