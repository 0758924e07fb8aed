"""What is read of a machine, from folders and programs made up for it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from opsin.doctor.host import Gpu, cpu_quota, read_gpus, read_host, run_command

SMI = "nvidia-smi"
GIB = 1 << 30


def write(root: Path, name: str, text: str = "") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def nothing(_: list[str]) -> str:
    """No command is here."""
    return ""


def may_not_use(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name and real(path, mode))


def nvidia(root: Path, name: str = "NVIDIA GeForce RTX 3090", *, nodes: bool = True) -> Path:
    write(root, "proc/driver/nvidia/gpus/0000:01:00.0/information", f"Model: \t\t {name}\nIRQ:   \t\t 33\n")
    write(root, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu\n")
    for node in ("nvidiactl", "nvidia0") if nodes else ():
        write(root, f"dev/{node}")
    return root


def card(root: Path, vendor: str, *, slot: str = "0000:03:00.0", kfd: bool = False, chips: str = "samsung") -> Path:
    device = root / "sys/devices" / slot
    write(device, "vendor", f"{vendor}\n")
    write(device, "mem_info_vram_vendor", f"{chips}\n")
    (device / "drm/renderD128").mkdir(parents=True)
    (root / "sys/class/drm/card0").mkdir(parents=True)
    (root / "sys/class/drm/card0/device").symlink_to(device)
    write(root, "dev/dri/renderD128")
    if kfd:
        (root / "sys/class/kfd").mkdir(parents=True)
        write(root, "dev/kfd")
    return device


def only(found: tuple[Gpu, ...]) -> Gpu:
    (gpu,) = found
    return gpu


def test_a_machine_without_gpus_has_none(tmp_path: Path) -> None:
    assert read_gpus(tmp_path, nothing) == ()


def test_nvidia_smi_tells_name_and_driver_where_there_are_no_files(tmp_path: Path) -> None:
    first, second = read_gpus(tmp_path, lambda _: "NVIDIA GeForce RTX 3090, 550.54.14\nTesla T4, 550.54.14\n")
    assert first == Gpu("CUDA", "NVIDIA GeForce RTX 3090", "550.54.14")
    assert second.name == "NVIDIA Tesla T4"


def test_the_drivers_files_tell_without_a_program(tmp_path: Path) -> None:
    gpu = only(read_gpus(nvidia(tmp_path), nothing))
    assert (gpu.kind, gpu.name, gpu.driver, gpu.trouble) == ("CUDA", "NVIDIA GeForce RTX 3090", "550.54.14", "")


def test_a_container_without_device_files_is_told_so(tmp_path: Path) -> None:
    gpu = only(read_gpus(nvidia(tmp_path, nodes=False), nothing))
    assert "--gpus all" in gpu.trouble


def test_device_files_that_may_not_be_opened_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_not_use(monkeypatch, "nvidia0")
    gpu = only(read_gpus(nvidia(tmp_path), nothing))
    assert "may not open /dev/nvidia0" in gpu.trouble


def test_an_amd_card_is_told_by_the_kernel(tmp_path: Path) -> None:
    device = card(tmp_path, "0x1002", kfd=True)
    write(device, "product_name", "AMD Radeon RX 7800\n")
    gpu = only(read_gpus(tmp_path, nothing))
    assert gpu == Gpu("ROCm", "AMD Radeon RX 7800")


@pytest.mark.parametrize("chips", ["", "unknown"])
def test_an_amd_gpu_inside_the_cpu_is_left_out(tmp_path: Path, chips: str) -> None:
    """It has a part of the CPU's memory, whose maker the kernel does not know, and ROCm has no use for it."""
    device = card(tmp_path, "0x1002", kfd=True, chips=chips)
    assert read_gpus(tmp_path, nothing) == ()
    write(device, "mem_info_vram_total", f"{64 * GIB}\n")
    assert only(read_gpus(tmp_path, nothing)).kind == "ROCm", "a card of a virtual machine"


@pytest.mark.parametrize("node", ["kfd", "renderD128"])
def test_rights_on_amds_files_are_looked_at(tmp_path: Path, node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card(tmp_path, "0x1002", kfd=True)
    may_not_use(monkeypatch, node)
    gpu = only(read_gpus(tmp_path, nothing))
    assert node in gpu.trouble
    assert "groups render and video" in gpu.trouble
    # The fix as a shell runs it, with a sudo that only says what it was asked.
    write(tmp_path, "bin/sudo", '#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin/sudo").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.defpath}"
    done = subprocess.run(["/bin/sh", "-c", gpu.fix or ""], env={"PATH": path}, capture_output=True, check=True)
    assert done.stdout.decode().split()[:4] == ["usermod", "-a", "-G", "render,video"]
    assert len(done.stdout.split()) == 5


def test_a_container_without_amds_files_is_told_so(tmp_path: Path) -> None:
    card(tmp_path, "0x1002", kfd=True)
    (tmp_path / "dev/kfd").unlink()
    assert "--device /dev/kfd" in only(read_gpus(tmp_path, nothing)).trouble


def test_apple_silicon_has_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert only(read_gpus(tmp_path, lambda _: "Apple M2\n")) == Gpu("Metal", "Apple M2 GPU")
    assert only(read_gpus(tmp_path, nothing)).name == "Apple GPU"
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert read_gpus(tmp_path, nothing) == ()


def test_no_limit_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    write(tmp_path, "proc/self/cgroup", "0::/app\n")
    write(tmp_path, "sys/fs/cgroup/app/cpu.max", "max 100000\n")
    assert cpu_quota(tmp_path) is None


def test_the_narrowest_group_above_counts(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/slice/app\n")
    write(tmp_path, "sys/fs/cgroup/slice/app/cpu.max", "400000 100000\n")
    write(tmp_path, "sys/fs/cgroup/slice/cpu.max", "150000 100000\n")
    write(tmp_path, "sys/fs/cpu.max", "1000 100000\n")  # above all groups
    assert cpu_quota(tmp_path) == 1.5


@pytest.mark.parametrize("group", ["/", "/docker/0123", "/../../kubepods/pod1"])
def test_a_container_whose_path_is_the_hosts_reads_its_own_mount(tmp_path: Path, group: str) -> None:
    write(tmp_path, "proc/self/cgroup", f"0::{group}\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "200000 100000\n")
    assert cpu_quota(tmp_path) == 2.0


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx avx2 fma avx512f amx_int8\n", "Xeon", "AVX AVX2 FMA AVX512 AMX_INT8"),
        ("Features\t: fp asimd asimddp i8mm\n", "", "NEON DOTPROD MATMUL_INT8"),
        ("", "", ""),
    ],
)
def test_instructions_are_told_in_ggmls_names(tmp_path: Path, text: str, name: str, features: str) -> None:
    write(tmp_path, "proc/cpuinfo", text)
    machine = read_host(tmp_path, nothing)
    assert (machine.cpu, machine.cpu_features) == (name, frozenset(features.split()))


def test_tools_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    write(tmp_path, "usr/local/cuda/bin/nvcc")
    (tmp_path / "usr/local/cuda/bin/nvcc").chmod(0o755)
    machine = read_host(tmp_path, nothing)
    assert machine.tools == {"nvcc": str(tmp_path / "usr/local/cuda/bin/nvcc")}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX programs")
def test_commands_give_words_or_nothing() -> None:
    assert run_command([sys.executable, "-c", "print('said')"]) == "said\n"
    assert run_command(["no-such-program-of-opsin"]) == ""


def test_this_machine_can_be_read() -> None:
    machine = read_host(run=nothing)
    assert machine.cores == os.cpu_count()
    assert 1 <= machine.threads <= machine.cores
    assert machine.allowed <= machine.cores
    assert machine.python == sys.executable
