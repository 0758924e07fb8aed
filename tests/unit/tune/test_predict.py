"""Devices of the table, needs of a pair from a shape or its files, and the times that follow from them."""

from dataclasses import replace

import pytest

from opsin.bench import cost
from opsin.core.errors import BadInput, BadParameter
from opsin.models.registry import KNOWN_MODELS, look_up
from opsin.models.resolve import demo_pair
from opsin.models.shapes import KNOWN_SHAPES, SHAPES
from opsin.tune.devices import DEVICES, REACHED, THIS, find_device, gpu_group
from opsin.tune.predict import (
    WEIGHT_BYTES,
    Request,
    check_fits,
    file_needs,
    first_choice,
    known_sizes,
    predict,
    shape_needs,
)

SEVEN = shape_needs(SHAPES["llava-1.5-7b"], "q4_0")
CARD = DEVICES["rtx-4090"]


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_every_device_has_rates_and_shares_that_can_be(device):
    assert 10e9 < device.bandwidth < 1e13
    assert 1e11 < device.rate < 1e16
    assert (device.memory == 0) == (device.group == "cpu")
    reached = REACHED[device.group]
    assert set(reached) == {"encode", "prefill", "decode"}
    assert all(0 < share < 1 for share in reached.values())


# Llama 2 7B with llama.cpp: decode of 128 tokens, prefill of 512; tokens a second. Sources: opsin.tune.devices.
@pytest.mark.parametrize(
    ("name", "weights", "stage", "published"),
    [
        ("rtx-4090", "f16", "decode", 61.03),
        ("rtx-4090", "q8_0", "decode", 98.13),
        ("m2", "q4_0", "decode", 21.91),
        ("m3-pro", "q8_0", "decode", 17.53),
        ("m4-max", "q4_0", "decode", 83.06),
        ("m2-ultra", "q8_0", "decode", 66.64),
        ("m3-ultra", "q4_0", "decode", 92.1),
        ("rtx-4090", "f16", "prefill", 11048.22),
        ("a100", "f16", "prefill", 8381.22),
        ("m2", "f16", "prefill", 201.34),
        ("m4-max", "q4_0", "prefill", 885.68),
        ("m2-ultra", "f16", "prefill", 1401.85),
    ],
)
def test_predictions_are_near_what_others_published(name, weights, stage, published):
    needs = replace(shape_needs(SHAPES["llava-1.5-7b"], weights), image_tokens=0)
    tokens = 512 if stage == "prefill" else 1
    found = predict(needs, DEVICES[name], Request(text_tokens=tokens, answer_tokens=128))
    per_s = 1e3 / found.decode_token_ms if stage == "decode" else 512e3 / found.prefill_ms
    assert published / 1.5 < per_s < published * 1.5


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("5090", "rtx-5090"),
        ("Apple M2 Max", "m2-max"),
        ("h100", "h100"),
        ("A100", "a100"),
        ("m1", "m1"),
        ("EPYC 9654", "epyc-9654"),
        ("7950x", "ryzen-7950x"),
    ],
)
def test_devices_are_found_as_people_write_them(given, name):
    assert find_device(given).name == name


def test_an_unknown_device_gets_the_nearest_names():
    with pytest.raises(BadParameter, match=r"rtx-4090.*--devices.*--device this"):
        find_device("rtx 4080")


@pytest.mark.parametrize("given", ["90", "x", "900k", "480", "00", "3u"])
def test_the_end_of_a_name_is_a_word_of_it(given):
    with pytest.raises(BadParameter, match="no device"):
        find_device(given)


@pytest.mark.parametrize(
    ("description", "group"),
    [
        ("NVIDIA H100 80GB HBM3", "hbm"),
        ("NVIDIA GeForce RTX 3090", "cuda"),
        ("AMD Radeon RX 7900 XTX", "cuda"),
        ("Apple M2 Ultra", "ultra"),
        ("Apple M4", "metal"),
    ],
)
def test_a_gpu_at_hand_has_a_group(description, group):
    assert gpu_group(description) == group


@pytest.mark.parametrize(("name", "gib"), [("m1", 32 / 3), ("m3-pro", 24), ("m2-max", 72), ("rtx-4090", 24)])
def test_a_gpu_of_apple_has_a_part_of_the_memory(name, gib):
    assert DEVICES[name].usable == pytest.approx(gib * 2**30)
    # At hand it is ggml that tells, and it tells that part.
    assert replace(DEVICES[name], name=THIS).usable == DEVICES[name].memory


def test_a_seven_billion_model_has_the_sizes_it_is_known_for():
    memory = predict(SEVEN, CARD, Request()).memory
    assert memory["model"] == pytest.approx(3.8e9, rel=0.02)
    assert memory["projector"] == pytest.approx(624e6, rel=0.02)
    assert memory["kv"] == 4096 * 2 * 4096 * 32 * 2  # half a mebibyte a token
    assert 50e6 < memory["compute"] < 500e6
    assert SEVEN.image_tokens == 576
    eighth = predict(shape_needs(SHAPES["llava-1.5-7b"], "q4_0", "q8_0"), CARD, Request()).memory
    assert eighth["kv"] == pytest.approx(memory["kv"] * 34 / 64)


def test_a_shape_needs_what_its_file_would():
    """CLIP ViT-L/14 at 336 pixels without its last block, by hand: 2 operations a weight and patch, and attention."""
    block, patches = 4 * 1024**2 + 2 * 1024 * 4096, 576
    ops = 22 * (2 * patches * block + 4 * patches**2 * 1024)
    assert SEVEN.cost.encode_ops == pytest.approx(ops, rel=0.08)  # kernel and projector come on top


def test_files_need_what_their_headers_say():
    pair = demo_pair()
    needs = file_needs(pair.llm, pair.mmproj, "demo")
    assert needs.model_bytes == pair.llm.stat().st_size
    assert needs.image_tokens == 36
    assert needs.cost.encode_ops == cost.read_cost(pair.llm, pair.mmproj).encode_ops
    text = file_needs(pair.llm, None, "text")
    assert (text.image_tokens, text.projector_bytes, text.cost.encode_ops) == (0, 0.0, None)


def test_an_unknown_projector_leaves_images_out_and_says_so(monkeypatch):
    monkeypatch.setattr(cost, "_MERGE", {})
    pair = demo_pair()
    needs = file_needs(pair.llm, pair.mmproj, "demo")
    assert (needs.cost.encode_ops, needs.image_tokens) == (None, 0)
    assert "images are left out" in needs.notes[0]
    found = predict(needs, CARD, Request())
    assert (found.encode_ms, found.image_prefill_ms) == (0, 0)


def test_decode_is_bytes_by_bandwidth_and_share():
    found = predict(SEVEN, CARD, Request(text_tokens=24, answer_tokens=100))
    read = SEVEN.cost.decode_bytes([576 + 24 + 50])
    assert found.decode_token_ms == pytest.approx(read / (CARD.bandwidth * REACHED["cuda"]["decode"]) * 1e3)
    assert found.first_token_ms == pytest.approx(found.encode_ms + found.prefill_ms)
    assert found.answer_ms == pytest.approx(found.first_token_ms + 99 * found.decode_token_ms)
    row = found.as_dict()
    assert row["fits"] is True
    assert row["decode_tokens_s"] == pytest.approx(1e3 / found.decode_token_ms, rel=1e-3)


def test_a_prefill_of_one_token_costs_a_decode_step_at_least():
    found = predict(SEVEN, CARD, Request(text_tokens=1))
    assert found.text_prefill_ms == pytest.approx(found.decode_token_ms, rel=0.05)


def test_apples_memory_is_shared_and_that_is_said():
    big = shape_needs(SHAPES["llava-1.5-7b"], "f16")
    prediction = predict(big, DEVICES["m1"], Request(ctx=8192))
    assert "about 11 of 16 GiB" in prediction.notes[-1]
    with pytest.raises(BadInput, match=r"has 11\.5 GB.*as q6_k"):
        check_fits(prediction)


def test_a_request_that_the_context_cannot_hold_is_refused():
    with pytest.raises(BadParameter, match=r"takes 768 tokens.*--ctx is 512"):
        predict(SEVEN, CARD, Request(ctx=512))


def test_a_pair_too_big_for_a_device_is_told_what_would_fit():
    big = shape_needs(SHAPES["llava-1.5-13b"], "f16")
    prediction = predict(big, CARD, Request())
    assert prediction.as_dict()["fits"] is False
    with pytest.raises(BadInput, match=r"needs 30\.\d GB.*RTX 4090 has 25\.8 GB.*as q8_0 \(1\d\.\d GB\)"):
        check_fits(prediction)
    check_fits(predict(big, DEVICES["h200"], Request()))
    check_fits(predict(big, DEVICES["epyc-9654"], Request()))  # its memory is the machine's affair


def test_a_context_that_would_fit_is_named():
    with pytest.raises(BadInput, match=r"--ctx 32768"):
        check_fits(predict(SEVEN, CARD, Request(ctx=65536)))


def test_an_unknown_type_is_refused():
    with pytest.raises(BadParameter, match="--type cannot be 'q5_k'"):
        shape_needs(SHAPES["small"], "q5_k")


# Billions of parameters that the makers publish.
PUBLISHED = {
    "llava-1.5-7b": 7.06, "llava-1.5-13b": 13.35, "llava-1.6-mistral-7b": 7.57, "smolvlm2-2.2b": 2.25,
    "smolvlm2-500m": 0.507, "smolvlm2-256m": 0.256, "qwen2.5-vl-3b": 3.75, "qwen2.5-vl-7b": 8.29,
    "qwen2.5-vl-32b": 33.5, "qwen2.5-vl-72b": 73.4, "qwen3-vl-2b": 2.13, "qwen3-vl-4b": 4.44, "qwen3-vl-8b": 8.77,
    "gemma-3-4b": 4.30, "gemma-3-12b": 12.2, "gemma-3-27b": 27.4, "internvl3-1b": 0.938, "internvl3-2b": 2.09,
    "internvl3-8b": 7.94, "internvl3-14b": 15.1, "minicpm-v-2.6": 8.10, "minicpm-v-4": 4.06, "minicpm-v-4.5": 8.70,
    "glm-4.6v-flash": 10.3, "glm-4.6v": 108, "kimi-vl": 16.4, "kimi-k2.5": 1030, "deepseek-ocr": 3.34,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_sizes_add_up_to_the_published_number_of_parameters(name):
    assert shape_needs(KNOWN_SHAPES[name], "f16").parameters == pytest.approx(PUBLISHED[name] * 1e9, rel=0.03)


# Bytes of language model and projector as they lie on the hub.
@pytest.mark.parametrize(
    ("name", "weights", "model", "projector"),
    [
        ("smolvlm2-500m", "q8_0", 436_808_704, None),
        ("internvl3-2b", "q4_k_m", 1_116_758_816, None),
        ("glm-4.6v-flash", "q4_k_m", 6.17e9, None),
        ("paddleocr-vl", "bf16", 935_768_992, 881_770_496),
    ],
)
def test_known_sizes_are_about_those_of_the_files(name, weights, model, projector):
    needs = shape_needs(KNOWN_SHAPES[name], weights)
    assert needs.model_bytes == pytest.approx(model, rel=0.08)
    assert projector is None or needs.projector_bytes == pytest.approx(projector, rel=0.03)


@pytest.mark.parametrize("known", KNOWN_MODELS, ids=lambda known: known.name)
def test_every_known_model_is_predicted(known):
    needs = shape_needs(KNOWN_SHAPES[known.name], known.weights)
    row = predict(needs, DEVICES["h200"], Request()).as_dict()
    assert 0 < row["encode_ms"] < 2000
    assert 0 < row["image_prefill_ms"] < 5000
    assert row["decode_tokens_s"] > 5
    assert row["fits"] is (known.name != "kimi-k2.5")
    sizes = known_sizes(known)
    assert sizes["download_bytes"] < sizes["memory_bytes"] == row["memory_total_bytes"]


def test_experts_that_a_token_does_not_use_cost_memory_and_no_time():
    needs = shape_needs(KNOWN_SHAPES["kimi-vl"], "q4_k_m")
    assert needs.model_bytes == pytest.approx(16e9 * WEIGHT_BYTES["q4_k_m"], rel=0.03)
    assert needs.cost.weight_bytes == pytest.approx(2.5e9 * WEIGHT_BYTES["q4_k_m"], rel=0.1)
    assert needs.cost.kv_values == 27 * 576  # keys and values share a vector


def test_what_is_assumed_of_an_image_is_said():
    notes = {name: shape_needs(shape, "q4_0").notes for name, shape in KNOWN_SHAPES.items()}
    assert notes["llava-1.5-7b"] == notes["gemma-3-4b"] == ()
    assert "640×480" in notes["qwen2.5-vl-7b"][0]
    assert "estimate" in notes["smolvlm2-2.2b"][-1]


def test_another_quantisation_has_another_size():
    known = look_up("qwen2.5-vl-7b").known
    assert known is not None
    usual, eighth = known_sizes(known), known_sizes(known, "Q8_0")
    assert usual["download_bytes"] == pytest.approx(6.0e9, rel=0.03)
    assert eighth["download_bytes"] == pytest.approx(9.4e9, rel=0.03)


@pytest.mark.parametrize(
    ("gb", "is_gpu", "name"),
    [
        (24, True, "gemma-3-27b"),
        (8, True, "qwen3-vl-8b"),
        (80, True, "glm-4.6v"),
        (16, False, "qwen3-vl-4b"),
        (1000, False, "qwen3-vl-4b"),
        (4, False, "smolvlm2-500m"),
        (0, True, None),
        (0, False, None),
    ],
)
def test_a_first_choice_fits_and_is_not_too_slow(gb, is_gpu, name):
    rows = [{"name": one.name, "ocr": one.ocr, **known_sizes(one)} for one in KNOWN_MODELS]
    assert first_choice(rows, gb * 1e9, is_gpu=is_gpu) == name


def test_a_model_that_only_reads_text_is_a_last_choice():
    rows = [
        {"name": "reader", "ocr": True, "parameters": 3, "memory_bytes": 3},
        {"name": "general", "ocr": False, "parameters": 2, "memory_bytes": 2},
    ]
    assert first_choice(rows, 100, is_gpu=True) == "general"
    assert first_choice(rows[:1], 100, is_gpu=True) == "reader"
