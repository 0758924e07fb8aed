"""Room: what goes where, what is free, each finding, and what is advised, with llama.cpp's words made up."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opsin.cli.app import app
from opsin.core.errors import ModelError
from opsin.core.settings import EngineSettings
from opsin.doctor import room
from opsin.doctor.check import Check
from opsin.doctor.free_memory import free_memory
from opsin.doctor.room import Estimate, Parts, by_hand, estimate_room, room_checks, weights_by_device
from opsin.models.gguf import GgufHeader, TensorHead, read_header
from opsin.native import Device
from opsin.native.memory import HOST, Reserved, device_of, read_log
from synth import write_pair

MIB, GIB = 2**20, 2**30

# A load of eight layers, half of them on a GPU, with flash attention off.
GPU_LOG = """
load_tensors: layer   0 assigned to device CPU, is_swa = 0
load_tensors: layer   1 assigned to device CPU, is_swa = 0
load_tensors: layer   2 assigned to device CUDA0, is_swa = 0
load_tensors: layer   3 assigned to device CUDA0, is_swa = 0
load_tensors: layer   4 assigned to device CUDA0, is_swa = 0
load_tensors:    CUDA_Host model buffer size =     0.00 MiB
load_tensors:        CUDA0 model buffer size =     0.00 MiB
llama_context: n_ubatch              = 512
llama_context: flash_attn            = disabled
llama_context:  CUDA_Host  output buffer size =     1.00 MiB
llama_kv_cache: layer   0: dev = CPU
llama_kv_cache: layer   1: dev = CPU
llama_kv_cache: layer   2: dev = CUDA0
llama_kv_cache: layer   3: dev = CUDA0
llama_kv_cache:        CPU KV buffer size =     0.00 MiB
llama_kv_cache: size =   64.00 MiB (  2048 cells,   4 layers,  4/1 seqs), K (f16):   32.00 MiB, V (f16):   32.00 MiB
sched_reserve:      CUDA0 compute buffer size =    80.00 MiB
sched_reserve:  CUDA_Host compute buffer size =     9.00 MiB
sched_reserve:      CUDA0 compute buffer size =    96.00 MiB
get_dummy_batch: warmup with image size = 336 x 336
load_hparams: image_max_pixels:   451584
reserve_compute_meta:      CUDA0 compute buffer size =    10.00 MiB
reserve_compute_meta:        CPU compute buffer size =     2.00 MiB
warmup: flash attention is enabled
""".strip().splitlines()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_pair("tiny", tmp_path_factory.mktemp("tiny"))


def gpu(free: int, name: str = "CUDA0") -> Device:
    return Device(name, "a GPU", "gpu", free, 2 * free, 1)


def cpu(total: int = 64 * GIB) -> Device:
    return Device("CPU", "a CPU", "cpu", total, total, 2)


def machine(root: Path, free: int) -> Path:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 99999 kB\nMemAvailable: {free // 1024} kB\n")
    return root


# ---- what the log says


def test_a_log_with_two_devices_is_read() -> None:
    told = read_log(GPU_LOG)
    assert told.layers == ["CPU", "CPU", "CUDA0", "CUDA0", "CUDA0"]
    assert told.kv == {"CPU": 32 * MIB, "CUDA0": 32 * MIB}
    assert told.compute == {"CUDA0": 96 * MIB, "CPU": 10 * MIB}, "the last word on a buffer, and the logits"
    assert told.vision_compute == {"CUDA0": 10 * MIB, "CPU": 2 * MIB}
    assert (told.rows, told.cells, told.streams, told.not_repacked) == (512, 2048, 1, None)
    assert (told.flash, told.vision_flash) == (False, True)
    assert (told.vision_edge, told.vision_pixels) == (336, 2 * 336**2 * 2)


def test_buffers_belong_to_devices() -> None:
    names = {"CPU_Mapped": "CPU", "CUDA_Host": "CPU", "CUDA0": "CUDA0", "MTL0_Mapped": "MTL0", "Vulkan_Host": "CPU"}
    assert {name: device_of(name) for name in names} == names


# ---- what goes where


def head(name: str, shape: tuple[int, ...], kind: str, end: int) -> TensorHead:
    return TensorHead(name, shape, kind, end)


def header(*tensors: TensorHead) -> GgufHeader:
    return GgufHeader(Path("model.gguf"), 10**6, {"general.architecture": "llama"}, {}, tensors)


TENSORS = (
    head("token_embd.weight", (64, 100), "Q4_0", 100 + 3600),
    head("blk.0.attn_q.weight", (64, 64), "Q4_0", 3700 + 2304),
    head("blk.0.attn_norm.weight", (64,), "F32", 6004 + 256),
    head("blk.1.attn_q.weight", (64, 64), "Q4_0", 6260 + 2304),
    head("output.weight", (64, 100), "Q6_K", 8564 + 5250),
)


def test_weights_go_where_their_layer_goes() -> None:
    found = weights_by_device([header(*TENSORS)], ["CPU", "CUDA0", "CUDA0"], None)
    assert found == {"CUDA0": 2304 + 5250, HOST: 3600 + 2304 + 256}
    assert weights_by_device([header(*TENSORS)], [HOST] * 3, None) == {HOST: 8564 + 5250 - 100}


def test_embeddings_without_an_output_of_their_own_are_there_twice() -> None:
    found = weights_by_device([header(*TENSORS[:-1])], ["CUDA0"] * 3, None)
    assert found == {"CUDA0": 2304 + 256 + 2304 + 3600, HOST: 3600}


def test_what_is_repacked_is_in_the_mapped_file_too() -> None:
    # Three of five stay: the two q4_0 matrices of the layers are repacked, the q6_K one is not.
    assert weights_by_device([header(*TENSORS)], [HOST] * 3, 3) == {HOST: 8564 + 5250 - 100 + 2 * 2304}
    # Two of five stay: q6_K is repacked as well, and the mapping ends before it.
    assert weights_by_device([header(*TENSORS)], [HOST] * 3, 2) == {HOST: 6260 - 100 + 2 * 2304 + 5250}


def told(**changes: Any) -> Reserved:
    return replace(read_log(GPU_LOG), vision_device="CUDA0", **changes)


def test_an_estimate_puts_it_together(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[EngineSettings]] = []
    monkeypatch.setattr(room, "reserve", lambda setups, vision: (asked.append(setups), [told()])[1])
    estimate = estimate_room(pair.llm, pair.mmproj, EngineSettings(picture_cache_bytes=7 * MIB))
    assert asked[0][0].model == pair.llm
    assert estimate.note is None
    assert estimate.ctx == 2048
    device, host = estimate.by_device["CUDA0"], estimate.by_device[HOST]
    assert (device.kv, device.compute, device.pictures, device.rest) == (32 * MIB, 96 * MIB, 0, 0)
    assert (host.kv, host.compute, host.pictures) == (32 * MIB, 10 * MIB, 7 * MIB)
    assert device.vision_compute == 40 * MIB, "the largest picture has four times the pixels"
    assert device.vision_weights > 0.9 * (pair.mmproj.stat().st_size - 16_000)
    assert host.vision_weights == 0
    assert host.rest > 512 * 2048 * 4 * 2, "scores a second time, in 16 bits"
    assert device.total == device.weights + device.kv + device.compute + device.vision_weights + device.vision_compute


def test_scores_grow_with_the_square_of_a_picture(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "reserve", lambda *_: [told(vision_flash=False)])
    scores = (336 // 14) ** 4 * 4 * 4
    found = estimate_room(pair.llm, pair.mmproj, EngineSettings()).by_device["CUDA0"].vision_compute
    assert found == (10 * MIB - scores) * 4 + scores * 16


def test_where_llama_cpp_cannot_be_asked_there_is_arithmetic(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def died(*_: object) -> list[Reserved]:
        raise ModelError("llama.cpp ended.")

    monkeypatch.setattr(room, "reserve", died)
    estimate = estimate_room(pair.llm, pair.mmproj, EngineSettings(ctx=1024))
    assert (estimate.note, estimate.refused) == ("llama.cpp ended.", True)
    assert estimate.by_device[HOST].kv == 2 * 2 * 32 * 1024 * 2, "two rows of 2 heads of 16 a layer, in 16 bits"
    monkeypatch.setattr(room, "reserve", lambda *_: [told(vision_compute={})])
    estimate = estimate_room(pair.llm, pair.mmproj, EngineSettings(ctx=1024))
    assert "arithmetic" in (estimate.note or "")
    assert not estimate.refused
    assert estimate.by_device["CUDA0"].vision_compute > 0


def test_arithmetic_follows_the_settings(pair: Any) -> None:
    files = read_header(pair.llm), read_header(pair.mmproj)
    alone, four = by_hand(*files, EngineSettings(ctx=4096)), by_hand(*files, EngineSettings(ctx=4096, parallel=4))
    assert (alone.cells, alone.streams, four.cells, four.streams) == (4096, 1, 1024, 5)
    assert four.kv[HOST] == alone.kv[HOST] * (5 * 1024 + 2048 + 1024) // 4096, "one to spare, two beside"
    assert by_hand(*files, EngineSettings(ctx=4096, kv_type="q8_0")).kv[HOST] == alone.kv[HOST] * 17 // 32
    assert by_hand(*files, EngineSettings(ctx=4096, flash_attention=False)).compute[HOST] > alone.compute[HOST]


# ---- what is free


def test_the_host_has_what_linux_calls_available(tmp_path: Path) -> None:
    root = machine(tmp_path, 3 * GIB)
    assert free_memory([cpu(), gpu(5 * GIB)], root) == {HOST: 3 * GIB, "CUDA0": 5 * GIB}
    assert free_memory([cpu(7)], tmp_path / "nowhere") == {HOST: 7}
    assert free_memory([], tmp_path / "nowhere") == {}


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_leaves_less(tmp_path: Path, version: int) -> None:
    root = machine(tmp_path, 8 * GIB)
    base = root / "sys/fs/cgroup" / ("memory/a/b" if version == 1 else "a/b")
    base.mkdir(parents=True)
    line = "5:cpu,memory:/a/b\n" if version == 1 else "0::/a/b\n"
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text(f"7:pids:/a/b\n{line}")
    limit, used, files = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    # The group above is the tighter one; what it holds of files can be dropped.
    (base / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    (base / used).write_text(f"{GIB}\n")
    (base.parent / limit).write_text(f"{4 * GIB}\n")
    (base.parent / used).write_text(f"{3 * GIB}\n")
    (base.parent / "memory.stat").write_text(f"anon 5\n{files} {GIB // 2}\n")
    assert free_memory([], root) == {HOST: GIB + GIB // 2}


# ---- the checks


def estimate_of(settings: EngineSettings, llm: Path = Path("m odel.gguf")) -> Estimate:
    """A made-up model: a GiB of weights in ten layers, 64 KiB a token of context in f16, 100 MiB of encoder."""
    layers = 10 if settings.gpu_layers is None else settings.gpu_layers
    share, ctx = layers / 10, settings.ctx or 8192
    kv = int(ctx * 64 * 1024 * (0.53 if settings.kv_type == "q8_0" else 1.0))
    return Estimate(
        by_device={
            "CUDA0": Parts(int(GIB * share), int(kv * share), 50 * MIB, 100 * MIB, 20 * MIB),
            HOST: Parts(int(GIB * (1 - share)), int(kv * (1 - share)), pictures=settings.picture_cache_bytes),
        },
        llm=llm,
        mmproj=Path("proj.gguf"),
        settings=settings.model_copy(update={"model": llm, "mmproj": Path("proj.gguf")}),
        ctx=ctx,
        layers=(HOST,) * (10 - layers) + ("CUDA0",) * layers,
    )


def again(llm: Path, mmproj: Path | None, setups: Sequence[EngineSettings]) -> list[Estimate]:
    assert mmproj is not None
    return [estimate_of(settings, llm) for settings in setups]


def checked(tmp_path: Path, on_gpu: int, on_host: int = 8 * GIB, **settings: Any) -> dict[str, Check]:
    checks = room_checks(
        estimate_of(EngineSettings(**settings)), [gpu(on_gpu), cpu()], machine(tmp_path, on_host), again
    )
    assert {check.name for check in checks} == {"room.memory"}
    return {check.evidence["device"]: check for check in checks}


def chosen(fix: str | None) -> dict[str, str]:
    """The settings that a command brings about, as `opsin serve --print-config` shows them."""
    assert fix is not None
    words = shlex.split(fix)
    assert words[0] == "opsin"
    result = CliRunner().invoke(app, [*words[1:], "--print-config"])
    assert result.exit_code == 0, result.output
    return dict(line.split("  # ")[0].split(" = ") for line in result.output.splitlines() if " = " in line)


def test_what_fits_is_ok(tmp_path: Path) -> None:
    checks = checked(tmp_path, 4 * GIB)
    assert {check.status for check in checks.values()} == {"ok"}
    assert checks["CUDA0"].fix is None
    assert checks["CUDA0"].message == "CUDA0 has 4.0 GiB free, and this setup needs 1.7 GiB at most."
    assert checks["CUDA0"].evidence["needed_bytes"] == GIB + 512 * MIB + 170 * MIB
    assert checks["CUDA0"].evidence["weights_bytes"] == GIB


def test_what_is_tight_is_warned_of(tmp_path: Path) -> None:
    check = checked(tmp_path, 1_800 * MIB)["CUDA0"]
    assert check.status == "warn"
    assert "that is tight" in check.message


def test_what_does_not_fit_fails_with_what_would(tmp_path: Path) -> None:
    checks = checked(tmp_path, 1_600 * MIB, parallel=2)
    check = checks["CUDA0"]
    assert check.status == "fail"
    assert checks[HOST].status == "ok"
    # 1,440 MiB may be used: 246 for the KV memory beside 1,194 of weights and buffers.
    assert "--ctx 2048" in check.message
    assert "--kv-type" not in check.message, "that alone is not enough"
    assert "--gpu-layers 8 would fit" in check.message
    assert "weights 1.0 GiB, KV memory 512 MiB, vision weights 100 MiB" in check.message
    values = chosen(check.fix)
    assert (values["ctx"], values["parallel"]) == ("2048", "2")
    assert values["model"] == '"m odel.gguf"'


def test_a_gpu_without_memory_of_its_own_takes_of_the_hosts(tmp_path: Path) -> None:
    """1.7 GiB there and 0.5 here are too much for 2 in all, and what is advised counts both."""
    inside = Device("CUDA0", "", "igpu", 8 * GIB, 8 * GIB, 1)
    root = machine(tmp_path, 2 * GIB)
    apart, pool = (
        {check.evidence["device"]: check for check in room_checks(estimate_of(EngineSettings()), [one], root, again)}
        for one in (gpu(8 * GIB), inside)
    )
    assert (apart[HOST].status, pool[HOST].status, pool["CUDA0"].status) == ("ok", "fail", "ok")
    assert pool[HOST].evidence["needed_bytes"] == (512 + 1024 + 512 + 170) * MIB
    assert "needs 2.2 GiB at most, 1.7 GiB of it for CUDA0" in pool[HOST].message
    mended = estimate_of(EngineSettings(picture_cache_bytes=int(chosen(pool[HOST].fix)["picture_cache_bytes"])))
    assert room_checks(mended, [inside], root, again)[0].status == "ok"


def test_kv_of_another_type_is_advised_where_it_is_enough(tmp_path: Path) -> None:
    check = checked(tmp_path, 1_800 * MIB)["CUDA0"]
    assert "--kv-type q8_0" in check.message


def test_several_changes_at_once_only_where_none_alone_is_enough(tmp_path: Path) -> None:
    # 1,049 MiB may be used: the shortest context alone makes it 1,056, in q8_0 it is 1,041.
    check = checked(tmp_path, 4 * GIB, 1_166 * MIB, gpu_layers=0, ctx=4096, picture_cache_bytes=0)[HOST]
    assert check.status == "fail"
    assert "--ctx 512 with --kv-type q8_0 would fit" in check.message
    values = chosen(check.fix)
    assert (values["ctx"], values["kv_type"], values["gpu_layers"]) == ("512", '"q8_0"', "0")


def test_the_picture_cache_goes_along_where_it_is_not_enough(tmp_path: Path) -> None:
    # 1,062 MiB may be used and 1,024 are weights: without pictures, too, the context has to be short.
    check = checked(tmp_path, 4 * GIB, 1_180 * MIB, gpu_layers=0, ctx=4096)[HOST]
    values = chosen(check.fix)
    assert (values["ctx"], values["picture_cache_bytes"]) == ("512", "0")


def test_a_smaller_picture_cache_is_the_first_advice_for_the_host(tmp_path: Path) -> None:
    check = checked(tmp_path, 4 * GIB, 500 * MIB)[HOST]
    assert check.status == "fail"
    assert int(chosen(check.fix)["picture_cache_bytes"]) == 450 * MIB
    assert "--picture-cache-bytes" in check.message


def test_what_no_setting_mends_says_so(tmp_path: Path) -> None:
    check = checked(tmp_path, 150 * MIB)["CUDA0"]
    assert check.status == "fail"
    assert check.fix is None
    assert "no setting makes it fit" in check.message


@pytest.mark.parametrize("refused", [True, False])
def test_arithmetic_is_told_as_such(tmp_path: Path, refused: bool) -> None:
    estimate = replace(estimate_of(EngineSettings()), note="llama.cpp ended.", refused=refused)
    checks = room_checks(estimate, [gpu(8 * GIB)], machine(tmp_path, 8 * GIB), again)
    assert "(by arithmetic: llama.cpp ended)" in checks[0].message
    assert {check.status for check in checks} == {"warn" if refused else "ok"}


def test_a_device_that_tells_nothing_has_no_check(tmp_path: Path) -> None:
    silent = Device("CUDA0", "", "gpu", 0, 0, 1)
    checks = room_checks(estimate_of(EngineSettings()), [silent], machine(tmp_path, 8 * GIB), again)
    assert [check.evidence["device"] for check in checks] == [HOST]
