"""The install command, run by a real shell with a Python that writes down what it was asked.

What is out of reach here is the network and the minutes of a compilation: that the flags exist was tried with CMake on
the pinned version's build files, and that pip knows the options is asked of pip's own parser.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from opsin.doctor.build import RECIPES, install_command
from opsin.doctor.host import Host
from opsin.native.devices import PINNED

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell line")
RECORD = '#!/bin/sh\nhere=$(dirname "$0")\nfor word in "$@"; do echo "$word"; done >>"$here/words"\nenv >"$here/env"\n'


def program(path: Path, text: str = RECORD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def a_machine(python: Path | str, **facts: Any) -> Host:
    return Host(python=str(python), **facts)


def run_line(line: str, python: Path, path: Path | None = None) -> tuple[list[str], dict[str, str]]:
    """The words and the environment that the recording Python saw."""
    environment = {"PATH": f"{path}:{os.defpath}" if path else os.defpath}
    subprocess.run(["/bin/sh", "-c", line], env=environment, check=True, timeout=20)
    pairs = (row.split("=", 1) for row in (python.parent / "env").read_text().splitlines() if "=" in row)
    return (python.parent / "words").read_text().splitlines(), dict(pairs)


@POSIX
@pytest.mark.parametrize("folder", ["plain", "a folder's $name with spaces"])
@pytest.mark.parametrize("backend", sorted(RECIPES))
def test_the_line_runs_and_its_flags_arrive(tmp_path: Path, folder: str, backend: str) -> None:
    python = program(tmp_path / folder / "python")
    line = install_command(a_machine(python), [backend])
    words, environment = run_line(line, python)
    assert words[:3] == ["-m", "pip", "install"]
    assert environment["CMAKE_ARGS"] == RECIPES[backend][0]
    requirement = Requirement(words[-1])
    assert requirement.name == "llama-cpp-python"
    assert requirement.specifier.contains(PINNED)
    assert not requirement.specifier.contains("0.3.35")
    assert "\n" not in line


@POSIX
@pytest.mark.slow
def test_pip_itself_accepts_the_options(tmp_path: Path) -> None:
    commands = pytest.importorskip("pip._internal.commands")
    python = program(tmp_path / "python")
    words, _ = run_line(install_command(a_machine(python), ["CUDA"]), python)
    options, requirements = commands.create_command("install").parse_args(words[3:])
    assert requirements == [f"llama-cpp-python=={PINNED}"]
    assert options.force_reinstall
    assert options.ignore_dependencies
    assert options.cache_dir is False or options.cache_dir is None


@POSIX
def test_extra_flags_and_several_backends_go_together(tmp_path: Path) -> None:
    python = program(tmp_path / "python")
    line = install_command(a_machine(python), ["Vulkan", "CUDA", "CPU"], ["-DGGML_NATIVE=on"])
    _, environment = run_line(line, python)
    assert environment["CMAKE_ARGS"].split() == ["-DGGML_CUDA=on", "-DGGML_VULKAN=on", "-DGGML_NATIVE=on"]


@POSIX
def test_without_flags_nothing_is_set_and_a_first_install_brings_its_dependencies(tmp_path: Path) -> None:
    python = program(tmp_path / "python")
    words, environment = run_line(install_command(a_machine(python), fresh=True), python)
    assert "CMAKE_ARGS" not in environment
    assert "--no-deps" not in words


@POSIX
def test_an_nvcc_outside_the_search_path_is_named(tmp_path: Path) -> None:
    python = program(tmp_path / "python")
    inside = a_machine(python, tools={"nvcc": "/usr/bin/nvcc"})
    assert "CUDACXX" not in run_line(install_command(inside, ["CUDA"]), python)[1]
    outside = a_machine(python, tools={"nvcc": "/usr/local/cuda/bin/nvcc"})
    assert run_line(install_command(outside, ["CUDA"]), python)[1]["CUDACXX"] == "/usr/local/cuda/bin/nvcc"


@POSIX
def test_hip_gets_its_compiler_from_hipconfig(tmp_path: Path) -> None:
    python = program(tmp_path / "python")
    tool = program(tmp_path / "bin" / "hipconfig", '#!/bin/sh\n[ "$1" = -l ] && echo /opt/llvm || echo /opt/rocm\n')
    line = install_command(a_machine(python, tools={"hipconfig": str(tool)}), ["ROCm"])
    environment = run_line(line, python, tool.parent)[1]
    assert (environment["HIPCXX"], environment["HIP_PATH"]) == ("/opt/llvm/clang", "/opt/rocm")


@POSIX
def test_an_environment_without_pip_uses_uv_or_makes_one(tmp_path: Path) -> None:
    uv, python = program(tmp_path / "uv"), program(tmp_path / "python")
    words, environment = run_line(
        install_command(a_machine(python, pip=False, tools={"uv": str(uv)}), ["CUDA"]), python
    )
    assert words[:4] == ["pip", "install", "--python", str(python)]
    assert environment["CMAKE_ARGS"] == "-DGGML_CUDA=on"
    (tmp_path / "words").unlink()
    words, _ = run_line(install_command(a_machine(python, pip=False), ["CUDA"]), python)
    assert words[:5] == ["-m", "ensurepip", "-m", "pip", "install"]
