"""Every check of a placement: where it fails for the reason it names, and where it passes."""

from pathlib import Path
from typing import Any

import pytest
from pair_fixes import parsed

from opsin.core.model_info import BackendShare, Placement
from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check
from opsin.doctor.placement import placement_checks
from opsin.native.devices import Device

LLM, MMPROJ = Path("/models/a model.gguf"), Path("/models/mmproj.gguf")
CPU = Device("CPU", "a CPU", "cpu", 2**33, 2**34, 1)
GPU = Device("CUDA0", "a GPU", "gpu", 2**33, 2**34, 2)
SOFTWARE = Device("Vulkan0", "llvmpipe (LLVM 15.0.6, 256 bits)", "gpu", 2**33, 2**34, 3)
INSIDE = Device("Vulkan0", "Intel(R) Graphics", "igpu", 2**33, 2**34, 3)
PAIR = {"model": str(LLM), "mmproj": str(MMPROJ), "parallel": 1}
ON_CPU = {"CPU": BackendShare(90, 1.0, 1.0, {"MUL_MAT": 60, "ADD": 30}, 1)}
ON_GPU = {"CUDA0": BackendShare(90, 1.0, 1.0, {"MUL_MAT": 60, "ADD": 30}, 1)}
LLM_ON_GPU = {
    "CUDA0": BackendShare(200, 0.999, 0.99, {"MUL_MAT": 200}, 1),
    "CPU": BackendShare(1, 0.001, 0.01, {"GET_ROWS": 1}, 1),
}


def checked(
    encoder: Any = ON_GPU,
    model: Any = LLM_ON_GPU,
    layers: int = 32,
    devices: tuple[Device, ...] = (CPU, GPU),
    unused: Check | None = None,
    **settings: Any,
) -> dict[str, Check]:
    chosen = EngineSettings(model=LLM, mmproj=MMPROJ, **settings)
    found = placement_checks(Placement(encoder, model, layers, 32), devices, chosen, unused=unused)
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def test_all_on_a_gpu_passes() -> None:
    found = checked()
    assert {name: check.status for name, check in found.items()} == dict.fromkeys(
        (
            "placement.encoder",
            "placement.language_model",
            "placement.layers",
            "placement.fallback",
            "placement.splits",
        ),
        "ok",
    )
    assert "100% on CUDA0" in found["placement.encoder"].message
    assert found["placement.language_model"].evidence["backends"]["CUDA0"]["nodes"] == 200


def test_all_on_the_cpu_passes_where_ggml_sees_no_gpu() -> None:
    found = checked(ON_CPU, ON_CPU, 0, (CPU,))
    assert {check.status for check in found.values()} == {"ok"}
    assert "ggml sees no GPU" in found["placement.layers"].message


def test_an_encoder_on_the_cpu_fails_where_a_gpu_is() -> None:
    """Whatever a log said: only what was computed counts."""
    check = checked(encoder=ON_CPU)["placement.encoder"]
    assert check.status == "fail"
    assert "100% on CPU although CUDA0 is here" in check.message
    assert parsed(check.fix) == ("serve", {**PAIR, "mmproj_device": "CUDA0"})


def test_an_encoder_of_which_a_tenth_is_on_the_gpu_fails() -> None:
    encoder = {"CPU": BackendShare(80, 0.9, 0.95, {"MUL_MAT": 80}), "CUDA0": BackendShare(9, 0.1, 0.05)}
    check = checked(encoder=encoder)["placement.encoder"]
    assert check.status == "fail"
    assert "90% on CPU, 10% on CUDA0" in check.message


@pytest.mark.parametrize("word", ["none", "cpu", " CPU"])
def test_the_fix_keeps_the_other_settings_and_what_fits_of_the_layers(word: str) -> None:
    kept = {"ctx": 4096, "kv_type": "q8_0", "parallel": 3}
    found = checked(ON_CPU, ON_CPU, 0, (CPU, GPU), device=word, mmproj_device=word, **kept)
    encoder, model = (parsed(found[f"placement.{name}"].fix)[1] for name in ("encoder", "language_model"))
    assert encoder == {**PAIR, **kept, "device": word, "mmproj_device": "CUDA0"}
    assert model == {**PAIR, **kept, "device": "CUDA0", "mmproj_device": word}


def test_the_card_that_is_in_use_is_the_one_advised() -> None:
    second = Device("CUDA1", "a GPU", "gpu", 2**33, 2**34, 4)
    model = {"CUDA1": BackendShare(200, 1.0)}
    found = checked(ON_CPU, model, devices=(CPU, GPU, second), device="CUDA1")
    assert parsed(found["placement.encoder"].fix)[1] == {**PAIR, "device": "CUDA1", "mmproj_device": "CUDA1"}


def test_a_part_that_no_setting_keeps_on_the_cpu_has_no_command() -> None:
    check = checked(encoder=ON_CPU, mmproj_device="CUDA0")["placement.encoder"]
    assert (check.status, check.fix) == ("fail", None)
    check = checked(model=ON_CPU)["placement.language_model"]
    assert (check.status, check.fix) == ("fail", None)
    found = checked(model=ON_CPU, layers=0)
    assert "see placement.layers" in found["placement.language_model"].message, "nothing fitted"


def test_a_gpu_made_of_software_is_none_until_something_runs_there() -> None:
    found = checked(ON_CPU, ON_CPU, 0, (CPU, SOFTWARE))
    assert {check.status for check in found.values()} == {"ok"}
    found = checked(ON_CPU, {"Vulkan0": BackendShare(200, 1.0)}, devices=(CPU, SOFTWARE))
    assert found["placement.encoder"].status == "fail"


def test_a_gpu_inside_the_cpu_is_warned_of_and_not_preferred() -> None:
    found = checked(ON_CPU, ON_CPU, 0, (CPU, INSIDE), mmproj_device="none", gpu_layers=0)
    assert {found[name].status for name in ("placement.encoder", "placement.language_model")} == {"warn"}
    check = checked(ON_CPU, ON_CPU, 0, (CPU, INSIDE, GPU), mmproj_device="none")["placement.encoder"]
    assert check.status == "fail"
    assert parsed(check.fix)[1]["mmproj_device"] == "CUDA0"


def test_a_gpu_that_llama_cpp_does_not_see_is_told_by_the_check_of_the_build() -> None:
    hidden = Check("build.gpu", "fail", "CUDA_VISIBLE_DEVICES is ''.", {}, "env -u CUDA_VISIBLE_DEVICES opsin doctor")
    found = checked(ON_CPU, ON_CPU, 0, (CPU,), unused=hidden)
    for name in ("placement.encoder", "placement.language_model"):
        assert found[name].status == "fail"
        assert found[name].fix == hidden.fix
        assert "see build.gpu" in found[name].message


def test_nodes_without_a_buffer_are_no_proof() -> None:
    check = checked(encoder={"unknown": BackendShare(9, 1.0)})["placement.encoder"]
    assert check.status == "warn"
    assert "cannot be told" in check.message


@pytest.mark.parametrize("layers", [0, 32])
def test_a_language_model_on_the_cpu_fails_where_a_gpu_is(layers: int) -> None:
    """Also where all layers were asked to be on the GPU."""
    check = checked(model=ON_CPU, layers=layers, gpu_layers=layers)["placement.language_model"]
    assert check.status == "fail"
    assert parsed(check.fix) == ("serve", {**PAIR, "gpu_layers": 33})


def test_some_layers_left_on_the_cpu_warn() -> None:
    model = {"CPU": BackendShare(100, 0.6, 0.9, {"MUL_MAT": 100}, 2), "CUDA0": BackendShare(60, 0.4, 0.1, {}, 1)}
    found = checked(model=model, layers=12, gpu_layers=13)
    assert found["placement.layers"].status == found["placement.language_model"].status == "warn"
    assert "12 of 32 layers" in found["placement.layers"].message
    assert parsed(found["placement.layers"].fix) == ("serve", {**PAIR, "gpu_layers": 33})
    short = checked(model=model, layers=12)["placement.layers"]
    assert (short.status, short.fix) == ("warn", None), "the others do not fit"
    assert "smaller quantisation" in short.message
    assert found["placement.fallback"].status == "ok", "layers that were left there did not fall back"


def test_operations_that_fall_back_are_named_with_count_and_share() -> None:
    encoder = {
        "CUDA0": BackendShare(300, 0.9, 0.5, {"MUL_MAT": 300}, 24),
        "CPU": BackendShare(25, 0.1, 0.5, {"FLASH_ATTN_EXT": 23, "IM2COL": 2}, 24),
    }
    found = checked(encoder=encoder)
    check = found["placement.fallback"]
    assert check.status == "warn"
    assert "FLASH_ATTN_EXT × 23, IM2COL × 2 (10.0% of its operations)" in check.message
    assert check.evidence["encoder"]["ops"] == {"FLASH_ATTN_EXT": 23, "IM2COL": 2}
    assert parsed(check.fix) == ("serve", {**PAIR, "vision_flash_attention": False})
    splits = found["placement.splits"]
    assert splits.status == "warn"
    assert splits.evidence["splits"] == {"encoder": 48, "language_model": 2}
    assert found["placement.encoder"].status == "ok"


def test_attention_of_the_language_model_has_a_flag_of_its_own() -> None:
    model = {
        "CUDA0": BackendShare(300, 0.9, 0.5, {"MUL_MAT": 300}, 33),
        "CPU": BackendShare(33, 0.1, 0.5, {"FLASH_ATTN_EXT": 32, "GET_ROWS": 1}, 33),
    }
    found = checked(model=model)
    assert found["placement.fallback"].evidence["language_model"]["ops"] == {"FLASH_ATTN_EXT": 32}
    assert parsed(found["placement.fallback"].fix) == ("serve", {**PAIR, "flash_attention": False})
    assert found["placement.splits"].status == "warn"


def test_another_fallback_has_no_command_that_mends_it() -> None:
    encoder = {
        "Vulkan0": BackendShare(300, 0.99, 0.9, {"MUL_MAT": 300}, 9),
        "CPU": BackendShare(8, 0.01, 0.1, {"POOL_2D": 8}, 8),
    }
    check = checked(encoder=encoder)["placement.fallback"]
    assert (check.status, check.fix) == ("warn", None)
    assert "POOL_2D × 8" in check.message


def test_an_encoder_that_could_not_be_watched_is_told() -> None:
    why = "The encoder could not be watched: no memory."
    chosen = EngineSettings(model=LLM, mmproj=MMPROJ)
    check, *_ = placement_checks(Placement({}, LLM_ON_GPU, 32, 32, (why,)), (CPU, GPU), chosen)
    assert (check.name, check.status, check.message) == ("placement.encoder", "warn", why)


def test_an_encoder_that_is_not_there_is_left_out() -> None:
    assert "placement.encoder" not in checked(encoder={}, model={"CUDA0": BackendShare(9, 1.0)})
