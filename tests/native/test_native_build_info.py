"""What the library that is installed says of itself."""

import platform

import pytest

from opsin.core.errors import NativeMismatch
from opsin.doctor.build import build_checks
from opsin.native.devices import COMMIT, PINNED, build_info
from opsin.native.library import ADVICE


def test_the_installed_library_tells_versions_backends_and_devices() -> None:
    build = build_info()
    assert (build.version, build.error) == (PINNED, "")
    assert build.llama
    assert build.commit == "unknown" or COMMIT.startswith(build.commit.removesuffix("-dirty"))
    assert "CPU" in build.backends
    assert any(device.type == "cpu" for device in build.devices)
    assert not build.assertions


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")
def test_its_instructions_are_told_without_their_values() -> None:
    assert "SSE3" in build_info().cpu_features
    assert all("=" not in name and "|" not in name for name in build_info().cpu_features)


def test_a_library_that_does_not_load_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NativeMismatch(f"The installed llama.cpp library lacks llama_decode: {ADVICE}.")

    monkeypatch.setitem(build_info.__globals__, "library", refuse)
    build = build_info()
    # What fixes it is the doctor's to say: it knows the GPUs that the next build is for.
    assert (build.version, build.error) == (PINNED, "The installed llama.cpp library lacks llama_decode")
    checks = {check.name: check for check in build_checks(build)}
    assert checks["build.version"].status == "fail"
    assert "lacks llama_decode" in checks["build.version"].message
    assert "build.gpu" not in checks


def test_no_library_at_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setitem(build_info.__globals__, "version", absent)
    assert build_info().error == "llama-cpp-python is not installed"
    assert build_info().version == ""


def test_the_checks_of_this_machine_name_the_version() -> None:
    (version,) = (check for check in build_checks(build_info()) if check.name == "build.version")
    assert version.status == "ok"
    assert PINNED in version.message
