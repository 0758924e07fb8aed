"""Doctor's proof on a machine with two devices: what runs where, and what falls back without a word."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from opsin.core.request import ImagePart
from opsin.core.settings import EngineSettings, ImageSettings
from opsin.doctor.placement import placement_checks
from opsin.images import load_image
from opsin.native.devices import devices

DEVICE = "Vulkan0"
Prove = Callable[..., Any]


def checks(found: Any, pair: Any, *, as_hardware: bool = False, **settings: Any) -> dict[str, Any]:
    """`as_hardware` gives the device the description of a card."""
    here = [replace(one, description="a card") if as_hardware else one for one in devices()]
    chosen = EngineSettings(model=pair.llm, mmproj=pair.mmproj, **settings)
    return {check.name: check for check in placement_checks(found, here, chosen)}


def statuses(found: Any, pair: Any, **more: Any) -> dict[str, str]:
    return {name.removeprefix("placement."): check.status for name, check in checks(found, pair, **more).items()}


def test_the_build_sees_a_second_device() -> None:
    found = {device.name: device for device in devices()}
    assert found[DEVICE].is_gpu
    assert found[DEVICE].memory_total > 0
    assert not found["CPU"].is_gpu


def test_by_default_both_parts_run_on_the_device(prove: Prove, pair: Any) -> None:
    found = prove("as it comes", pair)
    assert set(found.encoder) == {DEVICE}
    assert found.encoder[DEVICE].nodes > 20
    assert found.language_model[DEVICE].share_of_ops > 0.99
    # The table of token embeddings stays in host memory, whatever is offloaded.
    assert set(found.language_model["CPU"].ops) == {"GET_ROWS"}
    assert found.layers_offloaded == found.layers == 2
    assert set(statuses(found, pair).values()) == {"ok"}


def test_the_device_computes_what_the_cpu_computes(opened: Callable[..., Any], pair: Any) -> None:
    rgb = np.random.default_rng(3).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    embeddings = []
    for where in (DEVICE, "none"):
        backend = opened(pair, mmproj_device=where)
        tokenized = backend.tokenize([ImagePart(load_image(rgb, ImageSettings()))], add_bos=False)
        embeddings.append(np.array(backend.encode(tokenized.chunks[-1])).ravel())
        tokenized.close()
        backend.close()
    there, here = embeddings
    assert there @ here / np.linalg.norm(there) / np.linalg.norm(here) > 0.999


def test_with_offloading_off_both_parts_run_on_the_cpu(prove: Prove, pair: Any) -> None:
    off: dict[str, Any] = {"mmproj_device": "none", "gpu_layers": 0}
    found = prove("mmproj_device none, gpu_layers 0", pair, **off)
    assert set(found.encoder) == set(found.language_model) == {"CPU"}
    assert found.layers_offloaded == 0
    # On a device made of software there is nothing to gain.
    assert set(statuses(found, pair, **off).values()) == {"ok"}
    # Nothing falls back where nothing is offloaded; a card lies idle, which is the fault.
    told = statuses(found, pair, as_hardware=True, **off)
    assert told.pop("layers") == "warn"
    assert told == {"encoder": "fail", "language_model": "fail", "fallback": "ok", "splits": "ok"}


def test_a_projector_forced_to_the_cpu_fails_the_proof(prove: Prove, pair: Any) -> None:
    found = prove("mmproj_device none", pair, mmproj_device="none")
    assert set(found.encoder) == {"CPU"}
    assert found.language_model[DEVICE].share_of_ops > 0.99
    # The language model ran on the device, so its owner wants it, whatever it is made of.
    told = checks(found, pair, mmproj_device="none")
    assert told["placement.encoder"].status == "fail"
    assert told["placement.language_model"].status == "ok"
    assert f"--mmproj-device {DEVICE}" in told["placement.encoder"].fix
    assert set(prove("what its fix says", pair, mmproj_device=DEVICE).encoder) == {DEVICE}


def test_a_layer_left_on_the_cpu_is_seen_there(prove: Prove, pair: Any) -> None:
    """llama.cpp counts the output layer first: of two layers and the output, two on the device leave one."""
    found = prove("gpu_layers 2", pair, gpu_layers=2)
    assert set(found.encoder) == {DEVICE}
    assert found.language_model["CPU"].ops["MUL_MAT"] > 4
    assert 0.2 < found.language_model[DEVICE].share_of_ops < 0.8


def test_a_layer_left_on_the_cpu_is_not_counted(prove: Prove, pair: Any) -> None:
    found = prove("gpu_layers 2", pair, gpu_layers=2)
    assert found.layers_offloaded == 1
    assert statuses(found, pair, gpu_layers=2)["layers"] == "warn"


def test_an_operation_that_the_device_lacks_falls_back_and_is_named(prove: Prove, odd_pair: Any) -> None:
    """Three of the four blocks run, each with its attention between two pieces on the device."""
    found = prove("heads of 12, flash attention", odd_pair, flash_attention=True)
    fallen = found.encoder["CPU"]
    assert fallen.ops == {"FLASH_ATTN_EXT": 3}
    assert fallen.splits == 3
    assert found.encoder[DEVICE].splits == 4
    told = checks(found, odd_pair)
    assert told["placement.encoder"].status == "ok"
    assert told["placement.fallback"].status == "warn"
    assert told["placement.fallback"].evidence["encoder"]["ops"] == {"FLASH_ATTN_EXT": 3}
    assert told["placement.splits"].status == "warn"
    assert "--no-vision-flash-attention" in told["placement.fallback"].fix


def test_the_same_pair_without_that_operation_stays_on_the_device(prove: Prove, odd_pair: Any) -> None:
    found = prove("heads of 12, no flash attention", odd_pair, flash_attention=False)
    assert set(found.encoder) == {DEVICE}
    told = statuses(found, odd_pair)
    assert told["fallback"] == told["splits"] == "ok"
