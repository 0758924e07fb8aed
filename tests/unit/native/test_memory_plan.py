"""The memory planner on made-up devices: what goes where, what is chosen, and what a refusal names."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opsin.cli.app import app
from opsin.core.errors import BadParameter
from opsin.core.model_info import HOST, LayerFacts, ModelFacts, PairFacts, ProjectorFacts
from opsin.core.settings import EngineSettings
from opsin.native.devices import Device, free_memory
from opsin.native.memory import MemoryPlan, MemoryPlanner

MIB, GIB = 2**20, 2**30
CPU = Device("CPU", "a CPU", "cpu", 64 * GIB, 64 * GIB, 1)

# LLaVA-1.5 7B in q8_0: 32 layers of 215 MB, and the same again for its KV cache at 4,096 tokens.
LLAVA = PairFacts(
    ModelFacts(
        name="llava-7b.gguf",
        layers=(LayerFacts(215 * 10**6, {"Q8_0": 215 * 10**6}, 2 * 4096),) * 32,
        input_bytes=139 * 10**6,
        output=LayerFacts(139 * 10**6, {"Q8_0": 139 * 10**6}),
        tied=False,
        width=4096,
        heads=32,
        feed_forward=11_008,
        vocabulary=32_000,
        context=4096,
    ),
    ProjectorFacts("mmproj.gguf", 624 * 10**6, 576, 588, 576, 1024, 16, 4096),
)
SMALL = PairFacts(
    replace(LLAVA.model, name="small.gguf", layers=(LayerFacts(10**6, {"Q4_0": 10**6}, 256),) * 8, width=512)
)


def gpu(free: float, name: str = "CUDA0", kind: str = "gpu") -> Device:
    return Device(name, "a GPU", kind, int(free), 2 * int(free), 2)


def planned(pair: PairFacts, *devices: Device, host: int = 64 * GIB, features: str = "", **settings: Any) -> MemoryPlan:
    free = {HOST: host, **{one.name: one.memory_free for one in devices if one.memory_total}}
    words = frozenset(features.split())
    return MemoryPlanner(pair, (*devices, CPU), EngineSettings(**settings), free, words).plan()


def test_a_gpu_with_room_gets_everything() -> None:
    plan = planned(LLAVA, gpu(24 * GIB))
    assert (plan.gpu_layers, plan.ctx, plan.ubatch) == (33, 4096, 1024)
    assert set(plan.layers) == {"CUDA0"}
    needs = plan.by_device["CUDA0"]
    assert needs.weights == 32 * 215 * 10**6 + 139 * 10**6
    assert needs.kv == 32 * 8192 * 4096 * 2
    assert needs.vision_weights == 624 * 10**6
    assert plan.by_device[HOST].mapped == 139 * 10**6, "token embeddings stay on the host"


def test_an_8_gb_gpu_starts_with_fewer_layers_instead_of_failing() -> None:
    card = gpu(7.6 * GIB)
    plan = planned(LLAVA, card)
    assert plan.gpu_layers is not None
    assert 15 <= plan.gpu_layers < 33
    assert plan.ctx >= 2048, "layers are left out before the context becomes uncomfortable"
    assert plan.by_device["CUDA0"].total <= card.memory_free
    assert plan.layers[0] == HOST
    assert plan.layers[-1] == "CUDA0"
    applied = plan.applied(EngineSettings())
    assert (applied.ctx, applied.gpu_layers, applied.ubatch) == (plan.ctx, plan.gpu_layers, plan.ubatch)


def test_a_context_gives_way_before_a_layer_does() -> None:
    plan = planned(LLAVA, gpu(10 * GIB))
    assert plan.gpu_layers == 33
    assert 2048 <= plan.ctx < 4096


def test_what_is_asked_for_is_kept_or_refused_with_flags_that_fit() -> None:
    card = gpu(7.6 * GIB)
    assert planned(LLAVA, card, ctx=4096).ctx == 4096
    with pytest.raises(BadParameter) as refused:
        planned(LLAVA, card, ctx=4096, gpu_layers=33)
    flags = dict(re.findall(r"--([\w-]+) (\d+)", str(refused.value)))
    assert flags, refused.value
    again = {"ctx": 4096, "gpu_layers": 33} | {name.replace("-", "_"): int(value) for name, value in flags.items()}
    assert planned(LLAVA, card, **again).by_device["CUDA0"].total <= card.memory_free


def test_a_context_that_no_machine_holds_is_refused_at_once() -> None:
    with pytest.raises(BadParameter, match=r"--ctx \d+"):
        planned(LLAVA, ctx=1_000_000_000)


def test_the_command_refuses_a_huge_context_before_it_loads(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for ctx in ("4294967360", "1000000000"):
        done = CliRunner().invoke(app, ["ask", str(tmp_path / "a.png"), "what?", "--ctx", ctx])
        assert isinstance(done.exception, BadParameter), done.output
        assert "ctx" in str(done.exception)


def test_where_nothing_fits_a_smaller_model_is_named() -> None:
    with pytest.raises(BadParameter, match="smaller quantisation"):
        planned(LLAVA, host=GIB // 8)


def test_weights_on_the_host_are_mapped_and_need_not_fit() -> None:
    plan = planned(LLAVA, host=5 * GIB)
    assert plan.gpu_layers is None
    assert plan.by_device[HOST].mapped > 5 * GIB
    assert plan.by_device[HOST].least <= 5 * GIB
    assert plan.ctx >= 1024, "an image and a conversation have room"


def test_an_image_that_is_read_at_once_raises_the_ubatch() -> None:
    assert LLAVA.projector is not None
    whole = replace(LLAVA, projector=replace(LLAVA.projector, tokens=1120, patches=10_080, causal=False))
    assert planned(whole).ubatch >= 1120
    assert planned(whole, ubatch=64).ubatch >= 1120
    assert planned(LLAVA, ubatch=64).ubatch == 64


def test_the_largest_image_fits_the_context_where_the_model_was_trained_for_it() -> None:
    assert SMALL.projector is None
    assert LLAVA.projector is not None
    large = replace(LLAVA.projector, tokens=14_400)
    for trained, least, most in ((131_072, 14_400 + 320, 16_384), (8192, 8192, 8192), (4096, 4096, 4096)):
        pair = PairFacts(replace(SMALL.model, context=trained), large)
        assert least <= planned(pair).ctx <= most
    assert planned(PairFacts(replace(SMALL.model, context=131_072), LLAVA.projector)).ctx == 8192


def test_slots_share_the_context() -> None:
    assert planned(SMALL, parallel=8).ctx == 8 * 4096


def test_two_gpus_share_the_layers_by_what_is_free() -> None:
    plan = planned(LLAVA, gpu(16 * GIB), gpu(8 * GIB, "CUDA1"))
    assert 20 <= plan.layers.count("CUDA0") <= 24
    assert plan.layers[-1] == "CUDA1"
    one = planned(LLAVA, gpu(16 * GIB), gpu(8 * GIB, "CUDA1"), device="CUDA0")
    assert set(one.layers) == {"CUDA0"}


def test_the_encoder_has_a_device_of_its_own() -> None:
    plan = planned(LLAVA, gpu(24 * GIB), mmproj_device="none")
    assert plan.by_device["CUDA0"].vision_weights == 0
    assert plan.by_device[HOST].vision_weights == 624 * 10**6
    with pytest.raises(BadParameter, match="no device"):
        planned(LLAVA, gpu(24 * GIB), device="CUDA7")


def test_a_gpu_inside_the_cpu_takes_the_hosts_memory() -> None:
    plan = planned(LLAVA, gpu(24 * GIB, "MTL0"), host=24 * GIB)
    assert plan.gpu_layers == 33
    inside = planned(LLAVA, gpu(24 * GIB, "Vulkan0", "igpu"), host=6 * GIB)
    assert (inside.gpu_layers or 0) < 33


def test_types_that_the_cpu_repacks_are_there_twice() -> None:
    plain, packed = planned(SMALL, features="AVX"), planned(SMALL, features="AVX AVX2")
    assert (plain.by_device[HOST].repacked, packed.by_device[HOST].repacked) == (0, 8 * 10**6)
    beside = planned(SMALL, gpu(24 * GIB), features="AVX2", gpu_layers=4)
    assert beside.by_device[HOST].repacked == 0, "beside a GPU weights stay as they are"


def test_embeddings_that_are_the_output_layer_too_are_on_the_gpu_again() -> None:
    tied = replace(LLAVA, model=replace(LLAVA.model, tied=True))
    assert planned(tied).by_device[HOST].mapped == 32 * 215 * 10**6 + 139 * 10**6
    assert planned(tied, gpu(24 * GIB)).by_device["CUDA0"].weights == 32 * 215 * 10**6 + 139 * 10**6


def test_without_flash_attention_scores_are_counted() -> None:
    scores = 1024 * 4096 * 32 * 4
    with_flash, without = (
        planned(LLAVA, flash_attention=flash, ctx=4096).by_device[HOST].compute for flash in (True, False)
    )
    assert without - with_flash >= 0.8 * scores


def test_a_quantised_cache_is_smaller() -> None:
    f16, q8 = (
        MemoryPlanner(LLAVA, (CPU,), EngineSettings(kv_type=kind, ctx=4096), {}).needed() for kind in ("f16", "q8_0")
    )
    assert q8.by_device[HOST].kv == pytest.approx(f16.by_device[HOST].kv * 34 / 64)


def test_a_sliding_window_may_be_kept_alone_and_is_advised_where_that_fits() -> None:
    layers = [replace(layer, window=0 if at % 6 == 5 else 1024) for at, layer in enumerate(LLAVA.model.layers)]
    slides = PairFacts(replace(LLAVA.model, layers=tuple(layers), slides=True, context=131_072), LLAVA.projector)
    whole, windows = (
        planned(slides, ctx=65536, parallel=2, swa_full=full).by_device[HOST].kv for full in (True, False)
    )
    assert whole == 32 * 8192 * 65536 * 2
    assert windows == 5 * 8192 * 65536 * 2 + 27 * 8192 * (2 * 1024 + 1024) * 2
    with pytest.raises(BadParameter, match="--no-swa-full"):
        planned(slides, ctx=65536, parallel=2, host=18 * GIB)
    with pytest.raises(BadParameter) as refused:
        planned(LLAVA, ctx=65536, parallel=2, host=18 * GIB)
    assert "swa" not in str(refused.value)


def test_what_no_device_tells_has_no_limit() -> None:
    silent = Device("Vulkan0", "a GPU", "gpu", 0, 0, 2)
    assert planned(LLAVA, silent).gpu_layers == 33


def machine(root: Path, free: int) -> Path:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 99999 kB\nMemAvailable: {free // 1024} kB\n")
    return root


def test_free_memory_is_what_linux_calls_available(tmp_path: Path) -> None:
    root = machine(tmp_path, 3 * GIB)
    assert free_memory([CPU, gpu(5 * GIB)], root) == {HOST: 3 * GIB, "CUDA0": 5 * GIB}
    assert free_memory([CPU], tmp_path / "nowhere") == {HOST: 64 * GIB}
    assert free_memory([], tmp_path / "nowhere") == {}


def test_a_control_group_limits_what_is_free(tmp_path: Path) -> None:
    root = machine(tmp_path, 8 * GIB)
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text("0::/app/part\n")
    group = root / "sys/fs/cgroup/app"
    (group / "part").mkdir(parents=True)
    (group / "memory.max").write_text(f"{2 * GIB}\n")
    (group / "memory.current").write_text(f"{GIB}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 2}\n")
    (group / "part/memory.max").write_text("max\n")
    assert free_memory([], root) == {HOST: GIB + GIB // 2}


def test_a_limit_on_addresses_counts_without_what_threads_reserve(tmp_path: Path) -> None:
    root = machine(tmp_path, 8 * GIB)
    (root / "proc/self").mkdir()
    (root / "proc/self/status").write_text(f"VmPeak: 9 kB\nVmSize:\t{GIB // 1024} kB\n")
    (root / "proc/self/limits").write_text(f"Max address space         {3 * GIB}            unlimited      bytes\n")
    assert GIB < free_memory([], root)[HOST] < 2 * GIB
    (root / "proc/self/limits").write_text("Max address space         unlimited            unlimited      bytes\n")
    assert free_memory([], root) == {HOST: 8 * GIB}
