"""What is read of a machine, from folders and programs made up for it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opsin.doctor.host import GIB, MIB, Access, Gpu, cpu_quota, here, read_gpus, read_host, run_command
from opsin.native.devices import free_memory

SMI = "nvidia-smi"


def write(root: Path, name: str, text: str = "") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def access(
    root: Path,
    answers: dict[str, tuple[int, str]] | None = None,
    *,
    system: tuple[str, str] = ("Linux", "x86_64"),
    may_use: Callable[[Path], bool] = lambda _: True,
) -> Access:
    """Commands answer by their first word, or by the whole line."""
    known = answers or {}
    return Access(root, *system, lambda line: known.get(" ".join(line), known.get(line[0])), may_use)


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
    assert read_gpus(access(tmp_path)) == ()


def test_nvidia_smi_tells_name_memory_and_driver(tmp_path: Path) -> None:
    rows = "NVIDIA GeForce RTX 3090, 24576, 24000, 550.54.14\nTesla T4, 15360, [N/A], 550.54.14\n"
    first, second = read_gpus(access(nvidia(tmp_path), {SMI: (0, rows)}))
    assert first == Gpu("CUDA", "NVIDIA GeForce RTX 3090", 24576 * MIB, 24000 * MIB, "550.54.14")
    assert (second.name, second.memory_free) == ("NVIDIA Tesla T4", 0)


def test_without_nvidia_smi_the_drivers_files_tell(tmp_path: Path) -> None:
    gpu = only(read_gpus(access(nvidia(tmp_path))))
    assert (gpu.kind, gpu.name, gpu.driver, gpu.trouble) == ("CUDA", "NVIDIA GeForce RTX 3090", "550.54.14", "")


def test_a_container_without_device_files_is_told_so(tmp_path: Path) -> None:
    gpu = only(read_gpus(access(nvidia(tmp_path, nodes=False))))
    assert "--gpus all" in gpu.trouble


def test_device_files_that_may_not_be_opened_are_named(tmp_path: Path) -> None:
    gpu = only(read_gpus(access(nvidia(tmp_path), may_use=lambda path: path.name != "nvidia0")))
    assert "may not open /dev/nvidia0" in gpu.trouble


def test_a_driver_that_was_updated_under_way_is_told(tmp_path: Path) -> None:
    words = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.90\n"
    gpu = only(read_gpus(access(nvidia(tmp_path), {SMI: (18, words)})))
    assert "version mismatch" in gpu.trouble
    assert "restart" in gpu.trouble


def test_a_card_without_its_driver_is_found_on_the_bus(tmp_path: Path) -> None:
    for slot, kind in (("0000:01:00.0", "0x030000"), ("0000:01:00.1", "0x040300")):
        write(tmp_path, f"sys/bus/pci/devices/{slot}/vendor", "0x10de\n")
        write(tmp_path, f"sys/bus/pci/devices/{slot}/class", f"{kind}\n")
    gpu = only(read_gpus(access(tmp_path, {SMI: (9, "NVIDIA-SMI has failed")})))
    assert "driver is not loaded" in gpu.trouble


def test_amd_with_rocms_driver_has_memory_by_the_kernel(tmp_path: Path) -> None:
    device = card(tmp_path, "0x1002", kfd=True)
    write(device, "mem_info_vram_total", f"{16 << 30}\n")
    write(device, "mem_info_vram_used", f"{1 << 30}\n")
    write(device, "product_name", "AMD Radeon RX 7800\n")
    gpu = only(read_gpus(access(tmp_path)))
    assert gpu == Gpu("ROCm", "AMD Radeon RX 7800", 16 << 30, 15 << 30)


def test_amd_without_rocms_driver_is_a_vulkan_device(tmp_path: Path) -> None:
    card(tmp_path, "0x1002")
    assert only(read_gpus(access(tmp_path))).kind == "Vulkan"


@pytest.mark.parametrize(
    ("chips", "memory", "inside"),
    [("", GIB // 2, True), ("unknown", 4 * GIB, True), ("hynix", 4 * GIB, False), ("", 64 * GIB, False)],
)
def test_an_amd_gpu_inside_the_cpu_is_no_card(tmp_path: Path, chips: str, memory: int, inside: bool) -> None:
    """ROCm's driver is loaded for it too, but a GPU that has a part of the CPU's memory is no ROCm card.

    Cards of virtual machines do not tell the maker of their memory either.
    """
    device = card(tmp_path, "0x1002", kfd=True, chips=chips)
    write(device, "mem_info_vram_total", f"{memory}\n")
    (tmp_path / "dev/kfd").unlink()
    gpu = only(read_gpus(access(tmp_path)))
    assert (gpu.kind, gpu.integrated) == (("Vulkan", True) if inside else ("ROCm", False))
    assert ("/dev/kfd" in gpu.trouble) is not inside


def test_a_card_comes_before_the_gpu_inside_the_cpu(tmp_path: Path) -> None:
    card(tmp_path, "0x8086", slot="0000:00:02.0")
    device = card(tmp_path / "other", "0x8086", slot="0000:03:00.0")
    (tmp_path / "sys/class/drm/card1").mkdir()
    (tmp_path / "sys/class/drm/card1/device").symlink_to(device)
    assert [gpu.integrated for gpu in read_gpus(access(tmp_path))] == [False, True]


@pytest.mark.parametrize("node", ["kfd", "renderD128"])
def test_rights_on_amds_files_are_looked_at(tmp_path: Path, node: str) -> None:
    card(tmp_path, "0x1002", kfd=True)
    gpu = only(read_gpus(access(tmp_path, may_use=lambda path: path.name != node)))
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
    assert "--device /dev/kfd" in only(read_gpus(access(tmp_path))).trouble


@pytest.mark.parametrize(("slot", "integrated"), [("0000:00:02.0", True), ("0000:03:00.0", False)])
def test_intels_gpus_are_inside_the_cpu_or_on_a_card(tmp_path: Path, slot: str, integrated: bool) -> None:
    card(tmp_path, "0x8086", slot=slot)
    assert only(read_gpus(access(tmp_path))) == Gpu("Vulkan", "Intel GPU", integrated=integrated)


def test_the_gpu_with_the_fastest_backend_comes_first(tmp_path: Path) -> None:
    card(nvidia(tmp_path), "0x8086", slot="0000:00:02.0")
    assert [gpu.kind for gpu in read_gpus(access(tmp_path))] == ["CUDA", "Vulkan"]


def test_vulkaninfo_is_asked_where_nothing_else_is_found(tmp_path: Path) -> None:
    def device(kind: str, name: str) -> str:
        return (
            f"GPU0:\n\tdeviceType         = PHYSICAL_DEVICE_TYPE_{kind}\n\tdeviceName         = {name}\n"
            f"\tdriverID           = X\n"
        )

    text = device("CPU", "llvmpipe (LLVM 15)") + 2 * device("DISCRETE_GPU", "AMD Radeon RX 6800")
    found = read_gpus(access(tmp_path, {"vulkaninfo": (0, text)}, system=("Windows", "AMD64")))
    assert only(found) == Gpu("Vulkan", "AMD Radeon RX 6800")


def test_apple_silicon_has_a_gpu_that_shares_the_memory(tmp_path: Path) -> None:
    answers = {"sysctl": (0, "Apple M2\n17179869184\n")}
    gpu = only(read_gpus(access(tmp_path, answers, system=("Darwin", "arm64"))))
    assert gpu == Gpu("Metal", "Apple M2 GPU", 16 << 30)
    assert only(read_gpus(access(tmp_path, system=("Darwin", "arm64")))).name == "Apple GPU"


def test_an_intel_python_on_apple_silicon_is_trouble(tmp_path: Path) -> None:
    answers = {"sysctl -n sysctl.proc_translated": (0, "1\n")}
    gpu = only(read_gpus(access(tmp_path, answers, system=("Darwin", "x86_64"))))
    assert "arm64" in gpu.trouble
    answers = {"sysctl -n sysctl.proc_translated": (1, "sysctl: unknown oid\n")}
    assert read_gpus(access(tmp_path, answers, system=("Darwin", "x86_64"))) == ()


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


def test_control_groups_of_version_1_are_read_too(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/m\n2:cpu,cpuacct:/x\n1:name=systemd:/\n")
    write(tmp_path, "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "50000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n")
    # Another controller's group of that name is somebody else's.
    write(tmp_path, "sys/fs/cgroup/cpu/m/cpu.cfs_quota_us", "10000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/m/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(tmp_path) == 0.5
    write(tmp_path, "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1\n")
    assert cpu_quota(tmp_path) is None


def test_version_1_tells_what_files_take_in_the_groups_below_too(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", f"MemAvailable: {8 << 20} kB\n")
    write(tmp_path, "proc/self/cgroup", "7:\n4:memory:/m\n")
    group = "sys/fs/cgroup/memory/m/memory"
    for name, value in (("limit_in_bytes", 4 * GIB), ("usage_in_bytes", 3 * GIB)):
        write(tmp_path, f"{group}.{name}", f"{value}\n")
    write(tmp_path, f"{group}.stat", f"inactive_file 0\ntotal_inactive_file {GIB}\n")
    assert free_memory([], tmp_path) == {"CPU": 2 * GIB}


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
    machine = read_host(access(tmp_path))
    assert (machine.cpu, machine.cpu_features) == (name, frozenset(features.split()))


def test_instructions_of_a_mac_come_from_sysctl(tmp_path: Path) -> None:
    told = "machdep.cpu.brand_string: Apple M2\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
    machine = read_host(access(tmp_path, {"sysctl": (0, told)}, system=("Darwin", "arm64")))
    assert (machine.cpu, machine.cpu_features) == ("Apple M2", frozenset({"DOTPROD"}))


def test_tools_and_cuda_libraries_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    write(tmp_path, "usr/local/cuda/bin/nvcc")
    write(tmp_path, "usr/local/cuda-12.4/targets/x86_64-linux/lib/libcudart.so.12.4.99")
    write(tmp_path, "usr/local/cuda-12.4/targets/x86_64-linux/lib/libcublas.so.12")
    write(tmp_path, "usr/lib/x86_64-linux-gnu/libcudart.so.11.0")
    machine = read_host(access(tmp_path))
    assert machine.tools == {"nvcc": str(tmp_path / "usr/local/cuda/bin/nvcc")}
    assert machine.cuda_runtimes == (12,)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX programs")
def test_commands_give_status_and_words_or_nothing() -> None:
    assert run_command([sys.executable, "-c", "import sys; print('said'); sys.exit(3)"]) == (3, "said\n")
    assert run_command(["no-such-program-of-opsin"]) is None


def test_this_machine_can_be_read() -> None:
    looked: list[Any] = []
    machine = read_host(here(run=looked.append))
    assert machine.cores == os.cpu_count()
    assert 1 <= machine.threads <= machine.cores
    assert machine.allowed <= machine.cores
    assert machine.python == sys.executable
