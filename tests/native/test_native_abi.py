"""Whatever differs from the pinned llama-cpp-python is told in one sentence with the advice, before it can crash."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from opsin.core.errors import NativeMismatch
from opsin.native import library as abi
from opsin.native.ggml import bind
from opsin.native.library import library

ALTERED = [(struct, field) for struct, fields in abi.DEFAULTS.items() for field in fields]


class Other:
    """A module that differs in one name."""

    def __init__(self, module: Any, **changed: Any) -> None:
        self.__dict__.update(changed)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def check(version: str = abi.VERSION, **modules: Any) -> None:
    lib = library()
    found = {"llama": lib.llama, "mtmd": lib.mtmd, "ggml": lib.ggml, **modules}
    abi.check(version, found["llama"], found["mtmd"], found["ggml"])


def test_the_installed_library_is_the_one_expected() -> None:
    from llama_cpp import __version__

    check(__version__)


def test_another_version_names_both_and_the_command() -> None:
    with pytest.raises(NativeMismatch, match=r"0\.3\.35 is installed.*exactly 0\.3\.36: run: pip install .*==0\.3\.36"):
        check("0.3.35")


def test_another_library_under_the_same_bindings_is_refused() -> None:
    with pytest.raises(NativeMismatch, match=r"calls itself 0\.4\.9, not 0\.5\.0-dev \(is LLAMA_CPP_LIB_PATH set"):
        check(llama=Other(library().llama, llama_version=lambda: b"0.4.9"))


def test_a_missing_function_of_ggml_is_named() -> None:
    with pytest.raises(AttributeError, match="ggml_"):
        bind([ctypes.CDLL("libc.so.6")])


def test_a_library_that_lacks_a_function_of_the_bindings_is_refused_with_its_name() -> None:
    """Why the functions of llama.cpp and mtmd need no list here: importing the bindings looks each of them up."""
    code = """
import ctypes
found = ctypes.CDLL.__getattr__
def lacking(self, name):
    if name == "mtmd_encode_chunk":
        raise AttributeError(f"undefined symbol: {name}")
    return found(self, name)
ctypes.CDLL.__getattr__ = lacking
from opsin.core.errors import NativeMismatch
from opsin.native.library import library
try:
    library()
except NativeMismatch as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be loaded (undefined symbol: mtmd_encode_chunk): run: pip install" in done.stdout


@pytest.mark.parametrize(("struct", "field"), ALTERED, ids=str)
def test_each_known_default_is_watched(struct: str, field: str) -> None:
    name = "mtmd" if struct.startswith("mtmd") else "llama"
    shifted = SimpleNamespace(**{**abi.DEFAULTS[struct], field: "other"})
    with pytest.raises(NativeMismatch, match=rf"not laid out as Opsin expects \({struct}: {field}\)"):
        check(**{name: Other(getattr(library(), name), **{struct: lambda: shifted})})


def test_a_tensor_of_another_size_is_refused() -> None:
    with pytest.raises(NativeMismatch, match=r"not laid out as Opsin expects \(ggml_tensor\)"):
        check(ggml=Other(library().ggml, ggml_tensor_overhead=lambda: 400))


def test_our_mirror_reads_a_tensor_right() -> None:
    from opsin.native.ggml import InitParams, Tensor

    ggml = library().ggml
    context = ggml.ggml_init(InitParams(16 * ggml.ggml_tensor_overhead(), None, True))
    left, right = (ggml.ggml_new_tensor_4d(context, 1, 64, rows, 7, 1) for rows in (5, 3))
    product, factor = Tensor.from_address(ggml.ggml_mul_mat(context, left, right)), Tensor.from_address(left)
    assert (ggml.ggml_op_name(product.op), product.ne[:], product.src[:3]) == (
        b"MUL_MAT",
        [5, 3, 7, 1],
        [left, right, None],
    )
    assert (factor.type, factor.nb[:], factor.name) == (1, [2, 128, 640, 4480], b"")
    ggml.ggml_free(context)


def test_a_struct_that_lost_a_field_is_seen_by_the_defaults_behind_it() -> None:
    """The example server of 0.3.35 ran with the library of 0.3.36 and failed in the middle of a request."""
    lib = library()
    full = lib.mtmd.mtmd_context_params

    class Short(ctypes.Structure):
        _fields_ = [field for field in full._fields_ if field[0] != "warmup" and field[0] != "image_min_tokens"]

    shifted = Short.from_buffer_copy(bytes(lib.mtmd.mtmd_context_params_default()))
    watched = abi.DEFAULTS["mtmd_context_params_default"]
    assert any(getattr(shifted, name, None) != value for name, value in watched.items())
