"""Whatever differs from the pinned llama-cpp-python is told in one sentence with the mend, before it can crash."""

import dataclasses
from typing import Any

import pytest

from opsin.core.errors import NativeMismatch
from opsin.native import abi
from opsin.native.library import library

ALTERED: list[tuple[str, str, Any]] = [
    *((struct, field, "other") for struct, fields in abi.DEFAULTS.items() for field in fields),
]


def test_the_installed_library_is_the_one_expected() -> None:
    from llama_cpp import __version__

    lib = library()
    found = abi.observe(__version__, lib.llama, lib.mtmd, lib.ggml, [])
    assert found == abi.expected()
    abi.verify(found)


def test_another_version_names_both_and_the_command() -> None:
    with pytest.raises(NativeMismatch, match=r"0\.3\.35 is installed.*exactly 0\.3\.36: run: pip install .*==0\.3\.36"):
        abi.verify(dataclasses.replace(abi.expected(), version="0.3.35"))


def test_another_library_under_the_same_bindings_is_refused() -> None:
    with pytest.raises(NativeMismatch, match=r"calls itself 0\.4\.9, not 0\.5\.0-dev \(is LLAMA_CPP_LIB_PATH set"):
        abi.verify(dataclasses.replace(abi.expected(), library="0.4.9"))


def test_a_missing_symbol_is_named() -> None:
    with pytest.raises(NativeMismatch, match=r"lacks llama_gone, which Opsin needs: run: pip install"):
        abi.verify(dataclasses.replace(abi.expected(), missing=("llama_gone",)))


@pytest.mark.parametrize(("struct", "field", "value"), ALTERED, ids=str)
def test_each_known_default_is_watched(struct: str, field: str, value: Any) -> None:
    found = abi.expected()
    found.defaults[struct][field] = value
    with pytest.raises(NativeMismatch, match=rf"{struct} is not laid out as Opsin expects \({field} is 'other'"):
        abi.verify(found)


@pytest.mark.parametrize("field", list(abi.TENSOR))
def test_each_trait_of_a_tensor_is_watched(field: str) -> None:
    found = abi.expected()
    found.tensor[field] = None
    with pytest.raises(NativeMismatch, match=rf"ggml_tensor is not laid out as Opsin expects \({field} is None"):
        abi.verify(found)


def test_a_struct_that_lost_a_field_is_seen_by_the_defaults_behind_it() -> None:
    """The example server of 0.3.35 ran with the library of 0.3.36 and failed in the middle of a request."""
    import ctypes

    lib = library()
    full = lib.mtmd.mtmd_context_params

    class Short(ctypes.Structure):
        _fields_ = [field for field in full._fields_ if field[0] != "warmup" and field[0] != "image_min_tokens"]

    shifted = Short.from_buffer_copy(bytes(lib.mtmd.mtmd_context_params_default()))
    watched = abi.DEFAULTS["mtmd_context_params"]
    assert any(getattr(shifted, name, None) != value for name, value in watched.items())


def test_a_symbol_that_is_gone_is_found_by_observing() -> None:
    class Without:
        def __init__(self, module: Any, name: str) -> None:
            self._module, self._name = module, name

        def __getattr__(self, name: str) -> Any:
            if name == self._name:
                raise AttributeError(name)
            return getattr(self._module, name)

    lib = library()
    found = abi.observe(abi.VERSION, Without(lib.llama, "llama_decode"), lib.mtmd, lib.ggml, [])
    assert found.missing == ("llama_decode",)
