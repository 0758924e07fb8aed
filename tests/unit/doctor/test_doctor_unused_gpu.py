"""A GPU that is here and a build that cannot use it: one line with the command."""

import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from opsin.doctor.unused_gpu import unused_gpu_hint

LINUX = ("Linux", "x86_64")


def nvidia(root: Path, name: str = "NVIDIA GeForce RTX 3090") -> Path:
    card = root / "proc/driver/nvidia/gpus/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 33\n")
    return root


def amd(root: Path) -> Path:
    (root / "sys/class/kfd").mkdir(parents=True)
    device = root / "sys/class/drm/card0/device"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1002\n")
    return root


def test_nothing_is_said_where_there_is_no_gpu(tmp_path: Path) -> None:
    assert unused_gpu_hint(list, tmp_path, LINUX) is None


def test_an_unused_gpu_is_named_with_the_exact_command(tmp_path: Path) -> None:
    hint = unused_gpu_hint(list, nvidia(tmp_path), LINUX)
    assert hint is not None
    assert "An NVIDIA GeForce RTX 3090 is here, but this build has no CUDA backend" in hint
    command = shlex.split(hint.partition("with: ")[2])
    assert command[0] == "CMAKE_ARGS=-DGGML_CUDA=on"
    assert command[1:5] == [sys.executable, "-m", "pip", "install"]
    assert command[-1] == f"llama-cpp-python=={version('llama-cpp-python')}"
    assert "\n" not in hint


@pytest.mark.parametrize("backends", [["CUDA"], ["Vulkan"], ["CUDA", "Vulkan"]])
def test_nothing_is_said_where_the_build_uses_it(tmp_path: Path, backends: list[str]) -> None:
    assert unused_gpu_hint(lambda: backends, nvidia(tmp_path), LINUX) is None


def test_amd_and_apple_have_their_own_flags(tmp_path: Path) -> None:
    assert "GGML_HIP=on" in (unused_gpu_hint(list, amd(tmp_path), LINUX) or "")
    assert "GGML_METAL=on" in (unused_gpu_hint(list, Path("/nowhere"), ("Darwin", "arm64")) or "")
    assert unused_gpu_hint(lambda: ["Metal"], Path("/nowhere"), ("Darwin", "arm64")) is None
