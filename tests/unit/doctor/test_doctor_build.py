"""Each check of the build: once where it fails for the reason it names, once where it passes."""

import json
import shlex
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from opsin.doctor import build as room
from opsin.doctor.build import build_checks, unused_gpu_hint
from opsin.doctor.check import Check, worst
from opsin.doctor.host import Gpu, Host
from opsin.native.devices import COMMIT, PINNED, Build, Device, features_of, has_assertions

GIB = 1 << 30
RTX = Gpu("CUDA", "NVIDIA GeForce RTX 3090", "550.54.14")
RADEON = Gpu("ROCm", "AMD Radeon RX 7800")
APPLE = Gpu("Metal", "Apple M2 GPU")
CUDA0 = Device("CUDA0", "NVIDIA GeForce RTX 3090", "gpu", 23 * GIB, 24 * GIB, 1)
CPU = Device("CPU", "AMD EPYC", "cpu", 8 * GIB, 8 * GIB, 2)
GOOD = Build(
    version=PINNED,
    llama="0.5.0-dev",
    commit=COMMIT[:7] + "-dirty",
    backends=("CPU",),
    cpu_features=frozenset({"AVX", "AVX2", "FMA", "F16C", "OPENMP"}),
    devices=(CPU,),
)
CUDA = replace(GOOD, backends=("CUDA", "CPU"), devices=(CUDA0, CPU))
HOST = Host(cpu="AMD EPYC", cpu_features=frozenset({"AVX", "AVX2", "FMA", "F16C"}), cores=8, allowed=8, threads=4)


@pytest.fixture(autouse=True)
def _nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in room.HIDES:
        monkeypatch.delenv(name, raising=False)


def check(name: str, build: Build = GOOD, machine: Host = HOST) -> Check:
    (found,) = (check for check in build_checks(build, machine) if check.name == f"build.{name}")
    return found


def names(build: Build = GOOD, machine: Host = HOST) -> list[str]:
    return [check.name.removeprefix("build.") for check in build_checks(build, machine)]


def flags_of(found: Check) -> str:
    """The CMake flags that the fix hands to the build."""
    words = shlex.split(found.fix or "")
    assert "pip" in words
    return next((word.partition("=")[2] for word in words if word.startswith("CMAKE_ARGS=")), "")


def test_a_good_build_on_its_machine_passes_everything() -> None:
    checks = build_checks(CUDA, replace(HOST, gpus=(RTX,)))
    assert worst(checks) == "ok"
    assert all(found.fix is None and found.message for found in checks)
    assert [found.name.removeprefix("build.") for found in checks] == [*("version", "cpu", "driver", "gpu", "threads")]


def test_what_cannot_be_told_is_left_out() -> None:
    assert names() == ["version", "cpu", "gpu", "threads"]
    broken = Build(version="0.3.20", error="llama-cpp-python 0.3.20 is installed")
    assert names(broken, replace(HOST, gpus=(RTX,))) == ["version", "threads"]


def test_the_version_tells_the_commit() -> None:
    found = check("version")
    assert found.status == "ok"
    assert COMMIT[:7] in found.message


@pytest.mark.parametrize(
    "build",
    [
        Build(version="0.3.20", error="llama-cpp-python 0.3.20 is installed, but Opsin was built for exactly 0.3.36."),
        replace(GOOD, version="0.3.35"),
    ],
)
def test_another_version_fails_with_the_command_for_the_right_one(build: Build) -> None:
    found = check("version", build)
    assert found.status == "fail"
    assert build.version in found.message
    assert not found.message.endswith("..")
    assert f"llama-cpp-python=={PINNED}" in shlex.split(found.fix or "")


def test_no_version_at_all_is_installed_with_what_it_needs() -> None:
    found = check("version", Build(error="llama-cpp-python is not installed"))
    assert found.status == "fail"
    assert "not installed" in found.message
    assert "--no-deps" not in (found.fix or "")


def test_another_commit_under_the_right_version_is_warned_of() -> None:
    found = check("version", replace(GOOD, commit="deadbeef1"))
    assert (found.status, "deadbeef1" in found.message) == ("warn", True)
    assert check("version", replace(GOOD, commit="unknown")).status == "ok"


@pytest.mark.parametrize("version", ["", "0.2.60"])
def test_the_first_right_build_is_one_for_the_gpu(version: str) -> None:
    """A library that cannot be loaded does not tell its backends: the owner of an RTX was given a build for the CPU."""
    machine = replace(HOST, gpus=(RTX,), tools={"nvcc": "/usr/bin/nvcc"})
    broken = Build(version=version, error="it cannot be loaded")
    assert flags_of(check("version", broken, machine)) == "-DGGML_CUDA=on"
    bare = check("version", broken, replace(machine, tools={}))
    assert "after nvcc of NVIDIA's CUDA toolkit" in bare.message
    assert ("--no-deps" in (bare.fix or "")) == bool(version)
    assert flags_of(check("version", replace(CUDA, version="0.3.35"), machine)) == "-DGGML_CUDA=on"


def test_assertions_are_told_without_a_word_on_optimisation() -> None:
    """An optimised build that was made without -DNDEBUG has them as well."""
    found = check("assertions", replace(GOOD, assertions=True))
    assert (found.status, flags_of(found)) == ("warn", "-DCMAKE_BUILD_TYPE=Release")
    assert "optimis" not in found.message
    assert "assertions" not in names()


def test_the_librarys_file_tells_whether_it_has_assertions(tmp_path: Path) -> None:
    assert not has_assertions(tmp_path)
    (tmp_path / "libggml-base.so").write_bytes(b"\x7fELF\0memcpy\0")
    assert not has_assertions(tmp_path)
    (tmp_path / "libggml-base.so").write_bytes(b"\x7fELF\0__assert_fail\0")
    assert has_assertions(tmp_path)


def test_a_driver_or_a_card_that_does_not_fit_the_build_is_told_with_a_new_build() -> None:
    found = check("gpu", replace(CUDA, devices=(CPU,)), replace(HOST, gpus=(RTX,)))
    assert (found.status, flags_of(found)) == ("fail", "-DGGML_CUDA=on")
    assert "too old" in found.message


def test_system_info_tells_the_instructions_of_the_cpu_backend() -> None:
    line = "CUDA : ARCHS = 860 | USE_GRAPHS = 1 | CPU : AVX = 1 | AVX2 = 0 | FMA = 1 | "
    assert features_of(line) == {"AVX", "FMA"}
    assert features_of("") == frozenset()


def test_a_build_for_a_plain_cpu_fails() -> None:
    found = check("cpu", replace(CUDA, cpu_features=frozenset({"AVX"})))
    assert found.status == "fail"
    assert "AVX2, F16C, FMA" in found.message
    assert flags_of(found).split() == ["-DGGML_CUDA=on", "-DGGML_NATIVE=on"]


def test_an_instruction_that_only_some_weights_need_is_a_warning() -> None:
    found = check("cpu", machine=replace(HOST, cpu_features=HOST.cpu_features | {"AVX512_BF16"}))
    assert (found.status, found.evidence["unused"]) == ("warn", ["AVX512_BF16"])
    assert flags_of(found) == "-DGGML_NATIVE=on"


def test_a_build_that_uses_what_the_cpu_has_passes() -> None:
    assert check("cpu").status == "ok"
    assert check("cpu", machine=replace(HOST, cpu_features=frozenset())).status == "ok", "this system does not tell"


def test_a_driver_in_trouble_fails_and_the_gpu_waits_for_it() -> None:
    closed = replace(RADEON, trouble="this user may not open /dev/kfd", fix="sudo usermod -a -G render me")
    machine = replace(HOST, gpus=(closed,))
    found = check("driver", machine=machine)
    assert (found.status, found.fix) == ("fail", closed.fix)
    assert "may not open /dev/kfd" in found.message
    waiting = check("gpu", machine=machine)
    assert (waiting.status, "build.driver" in waiting.message) == ("warn", True)
    assert check("driver", machine=replace(HOST, gpus=(RTX,))).status == "ok"


def test_a_card_in_trouble_fails_only_where_no_other_card_serves() -> None:
    shut = replace(RADEON, trouble="this user may not open /dev/kfd", fix="sudo usermod -a -G render me")
    found = check("driver", machine=replace(HOST, gpus=(RTX, shut)))
    assert (found.status, found.fix) == ("warn", shut.fix)
    assert check("driver", machine=replace(HOST, gpus=(shut,))).status == "fail"


@pytest.mark.parametrize(
    ("gpu", "flag"), [(RTX, "-DGGML_CUDA=on"), (RADEON, "-DGGML_HIP=on"), (APPLE, "-DGGML_METAL=on")]
)
def test_a_gpu_without_its_backend_fails_with_the_exact_command(gpu: Gpu, flag: str) -> None:
    found = check("gpu", machine=replace(HOST, gpus=(gpu,)))
    assert found.status == "fail"
    assert f"An {gpu.name} is here, but this build has no {gpu.kind} backend" in found.message
    assert flags_of(found) == flag


def test_the_backends_that_are_there_stay() -> None:
    found = check("gpu", replace(GOOD, backends=("BLAS", "CPU")), replace(HOST, gpus=(RTX,)))
    assert flags_of(found).split() == ["-DGGML_BLAS=on", "-DGGML_CUDA=on"]


def test_what_is_missing_to_compile_is_said() -> None:
    bare = replace(HOST, gpus=(RTX,))
    assert "after nvcc of NVIDIA's CUDA toolkit" in check("gpu", machine=bare).message
    ready = check("gpu", machine=replace(bare, tools={"nvcc": "/usr/bin/nvcc"}))
    assert flags_of(ready) == "-DGGML_CUDA=on"
    assert "not here" not in ready.message


def test_a_gpu_that_the_environment_hides_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = replace(CUDA, devices=(CPU,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    found = check("gpu", blind, replace(HOST, gpus=(RTX,)))
    assert found.status == "fail"
    assert "CUDA_VISIBLE_DEVICES is '-1'" in found.message
    program = tmp_path / "opsin"
    program.write_text('#!/bin/sh\necho "$1 ${CUDA_VISIBLE_DEVICES-unset}"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(["/bin/sh", "-c", found.fix or ""], env=environment, capture_output=True, check=True)
    assert done.stdout == b"doctor unset\n"


def test_some_of_the_gpus_missing_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(HOST, gpus=(RTX, RTX))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = check("gpu", CUDA, machine)
    assert (found.status, found.fix) == ("warn", "env -u CUDA_VISIBLE_DEVICES opsin doctor")
    assert "and llama.cpp sees 1" in found.message
    both = replace(CUDA, devices=(CUDA0, replace(CUDA0, name="CUDA1"), CPU))
    assert check("gpu", both, machine).status == "ok"


def test_a_gpu_in_software_is_no_gpu() -> None:
    pipe = Device("Vulkan0", "llvmpipe (LLVM 15.0.6, 256 bits)", "gpu", 8 * GIB, 8 * GIB, 3)
    build = replace(GOOD, backends=("Vulkan", "CPU"), devices=(pipe, CPU))
    assert check("gpu", build).status == "warn"
    remote = replace(build, devices=(replace(pipe, name="RPC0", description="127.0.0.1:50052"), CPU))
    assert check("gpu", remote).status == "ok"
    card = check("gpu", build, replace(HOST, gpus=(RTX,)))
    assert (card.status, "llama.cpp sees 0" in card.message) == ("fail", True)


def test_a_gpu_that_cuda_calls_integrated_is_the_one_that_nvidia_smi_lists() -> None:
    build = replace(CUDA, devices=(replace(CUDA0, type="igpu"), CPU))
    assert check("gpu", build, replace(HOST, gpus=(RTX,))).status == "ok"


def test_vulkan_serves_every_gpu() -> None:
    device = replace(CUDA0, name="Vulkan0")
    build = replace(GOOD, backends=("Vulkan", "CPU"), devices=(device, CPU))
    for gpu in (RTX, RADEON):
        assert check("gpu", build, replace(HOST, gpus=(gpu,))).status == "ok"


def test_a_second_gpu_needs_no_backend_of_its_own() -> None:
    assert check("gpu", CUDA, replace(HOST, gpus=(RTX, RADEON))).status == "ok"
    rocm = replace(GOOD, backends=("ROCm", "CPU"), devices=(replace(CUDA0, name="ROCm0"), CPU))
    assert check("gpu", rocm, replace(HOST, gpus=(RTX, RADEON))).status == "ok"
    blind = check("gpu", replace(rocm, devices=(CPU,)), replace(HOST, gpus=(RTX, RADEON)))
    assert (blind.status, RADEON.name in blind.message) == ("fail", True)


def test_a_quota_below_the_threads_is_told_with_its_numbers() -> None:
    found = check("threads", machine=replace(HOST, quota=2.5))
    assert found.status == "warn"
    assert "2.5 of 8 cores" in found.message
    assert "--threads 2" in found.message
    assert found.evidence == {"cores": 8, "allowed_cores": 8, "quota_cores": 2.5, "threads": 4}
    assert "--threads 1" in check("threads", machine=replace(HOST, quota=0.5)).message


def test_the_threads_that_were_asked_for_are_judged() -> None:
    machine = replace(HOST, quota=2.5)
    statuses = [build_checks(GOOD, machine, threads=asked)[-1].status for asked in (None, 1, 2, 3)]
    assert statuses == ["warn", "ok", "ok", "warn"]
    assert build_checks(GOOD, replace(HOST, quota=0.5), threads=1)[-1].status == "ok"


def test_an_affinity_below_the_cores_warns_of_threads_beyond_it_only() -> None:
    """Opsin starts as many threads as it may use cores: a container with some of them is nothing to warn of."""
    machine = replace(HOST, allowed=2, threads=2)
    found = check("threads", machine=machine)
    assert (found.status, "2 of 8 cores" in found.message) == ("ok", True)
    more = build_checks(GOOD, machine, threads=8)[-1]
    assert (more.status, "--threads 2" in more.message) == ("warn", True)


@pytest.mark.parametrize("quota", [None, 4.0, 8.0])
def test_enough_cores_pass(quota: float | None) -> None:
    assert check("threads", machine=replace(HOST, quota=quota)).status == "ok"


def test_every_row_is_plain_json() -> None:
    for found in build_checks(GOOD, replace(HOST, gpus=(RTX,))):
        assert json.loads(json.dumps(asdict(found)))["name"] == found.name


def test_without_a_host_this_one_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "read_host", lambda *_: replace(HOST, gpus=(RTX,)))
    assert {found.name: found.status for found in build_checks(GOOD)}["build.gpu"] == "fail"


def hint(*gpus: Gpu, build: Build = GOOD, **facts: Any) -> str | None:
    return unused_gpu_hint(build, replace(HOST, gpus=gpus, python="/opt/my python/bin/python", **facts))


@pytest.mark.parametrize(("gpu", "flag"), [(RTX, "CUDA"), (RADEON, "HIP"), (APPLE, "METAL")])
def test_an_unused_gpu_is_hinted_at_in_one_line_with_the_command(gpu: Gpu, flag: str) -> None:
    said = hint(gpu)
    assert said is not None
    assert f"An {gpu.name} is here, but this build has no {gpu.kind} backend" in said
    command = shlex.split(said.partition("with: ")[2])
    assert command[:5] == [f"CMAKE_ARGS=-DGGML_{flag}=on", "/opt/my python/bin/python", "-m", "pip", "install"]
    assert command[-1] == f"llama-cpp-python=={PINNED}"
    assert "\n" not in said


@pytest.mark.parametrize(
    ("gpus", "build"),
    [
        ((), GOOD),
        ((RTX,), CUDA),
        ((RTX,), replace(GOOD, backends=("Vulkan", "CPU"))),
        ((replace(RTX, trouble="its device files are not here"),), GOOD),
        ((RTX,), Build(error="cannot be loaded")),
    ],
)
def test_nothing_is_hinted_at_where_another_build_would_not_help(gpus: tuple[Gpu, ...], build: Build) -> None:
    assert hint(*gpus, build=build) is None


def test_the_hint_looks_at_this_machine_without_running_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def machine(run: Any) -> Host:
        looked.append(run(["nvidia-smi"]))
        return replace(HOST, gpus=(RTX,))

    monkeypatch.setattr(room, "read_host", machine)
    monkeypatch.setattr(room, "build_info", lambda: GOOD)
    assert "RTX 3090" in (unused_gpu_hint() or "")
    assert looked == [""]
