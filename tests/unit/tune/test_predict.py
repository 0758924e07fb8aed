"""Devices of the table, needs of a pair from a shape or its files, and the times that follow from them."""

from dataclasses import replace

import pytest

from opsin.bench import cost
from opsin.core.errors import BadInput, BadParameter
from opsin.models.resolve import demo_pair
from opsin.models.shapes import SHAPES
from opsin.tune.devices import DEVICES, REACHED, THIS, find_device, gpu_group
from opsin.tune.predict import Request, check_fits, file_needs, predict, shape_needs

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
