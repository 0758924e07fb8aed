"""Needs of a pair from a shape or its files, and the times that follow from them."""

from dataclasses import replace

import pytest

from opsin.cli.predict import _smaller
from opsin.core.errors import BadInput, BadParameter
from opsin.models.shapes import SHAPES
from opsin.models.synth import write_pair
from opsin.tune.device_table import DEVICES
from opsin.tune.predict import Request, Times, check_room, predict_on, scale, share_of
from opsin.tune.predict_needs import file_needs, shape_needs, slice_of, written_type

SMALL = shape_needs(SHAPES["small"], "q8_0", "f16")
SEVEN = shape_needs(SHAPES["llava-1.5-7b"], "q4_0", "f16")
CARD = DEVICES["rtx-4090"]


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("llava-1.6-tiny", "qwen2vl-tiny", "gemma3-tiny")]


@pytest.mark.parametrize("shape", ["tiny", *OTHERS])
def test_files_need_what_their_shape_needs(shape, tmp_path):
    pair = write_pair(shape, tmp_path)
    by_shape, by_file = shape_needs(SHAPES[shape], "q8_0", "f16"), file_needs(pair.llm, pair.mmproj, shape)
    assert (by_file.llm_type, by_file.mmproj_type) == ("q8_0", "f16")
    assert replace(by_file.cost, encode_ops=None) == replace(by_shape.cost, encode_ops=None)
    assert by_file.shape.text.kv_width == by_shape.shape.text.kv_width
    assert by_file.shape.text.vocabulary == by_shape.shape.text.vocabulary
    assert by_file.llm_bytes == pytest.approx(by_shape.llm_bytes, rel=0.5)  # a tiny file is half vocabulary
    if shape == "qwen2vl-tiny":  # a picture of 640 by 480 instead of the shape's own
        assert by_file.image_tokens == 23 * 17
        assert "640×480" in by_file.notes[0]
    else:
        assert by_file.image_tokens == by_shape.image_tokens
        assert by_file.cost.encode_ops == by_shape.cost.encode_ops


def test_an_unknown_projector_leaves_pictures_out_and_says_so(tmp_path, monkeypatch):
    from opsin.bench import cost

    pair = write_pair("tiny", tmp_path)
    monkeypatch.setattr(cost, "_MERGE", {})
    needs = file_needs(pair.llm, pair.mmproj, "tiny")
    assert needs.cost.encode_ops is None
    assert needs.image_tokens == 0
    assert "'mlp'" in needs.notes[0]
    assert predict_on(CARD, needs, Request()).times.encode_ms == 0


def test_a_seven_billion_model_has_the_sizes_it_is_known_for():
    memory = SEVEN.memory(4096)
    assert memory["model"] == pytest.approx(3.8e9, rel=0.02)
    assert memory["projector"] == pytest.approx(624e6, rel=0.01)
    assert memory["kv"] == 4096 * 2 * 4096 * 32 * 2  # half a mebibyte a token
    assert SEVEN.image_tokens == 576


def test_decode_on_a_card_is_bytes_by_bandwidth_and_share():
    request = Request(text_tokens=24, answer_tokens=100)
    found = predict_on(CARD, SEVEN, request)
    share = share_of(CARD, "decode", "q4_0").value
    read = SEVEN.cost.decode_bytes([576 + 24 + 50])
    assert found.times.token_ms == pytest.approx(read / (CARD.bandwidth * share) * 1e3)
    assert found.first_token_ms == pytest.approx(found.times.encode_ms + found.times.prefill_ms)
    assert found.answer_ms == pytest.approx(found.first_token_ms + 99 * found.times.token_ms)
    row = found.as_dict()
    assert row["fits"] is True
    assert row["decode_tokens_s"] == pytest.approx(1e3 / found.times.token_ms, rel=1e-3)


def test_context_makes_decode_and_prefill_slower():
    short, long = (predict_on(CARD, SEVEN, Request(ctx_used=used, ctx=32768)).times for used in (0, 16384))
    kv = 16384 * SEVEN.cost.kv_values * 2
    share = share_of(CARD, "decode", "q4_0").value
    assert long.token_ms - short.token_ms == pytest.approx(kv / (CARD.bandwidth * share) * 1e3, rel=1e-6)
    assert long.image_prefill_ms > 1.2 * short.image_prefill_ms
    assert long.encode_ms == short.encode_ms


def test_a_prefill_of_one_token_costs_a_decode_step_at_least():
    times = predict_on(CARD, SEVEN, Request(text_tokens=1)).times
    assert times.text_prefill_ms == pytest.approx(times.token_ms, rel=0.05)


def test_a_pair_that_is_its_own_slice_has_the_slices_times():
    measured = Times(400.0, 900.0, 120.0, 12.0, 576, 70, 662)
    same = scale(measured, SMALL, SMALL, Request(text_tokens=70, answer_tokens=32))
    assert same.encode_ms == pytest.approx(400)
    assert same.image_prefill_ms == pytest.approx(900)
    assert same.text_prefill_ms == pytest.approx(120)
    assert same.token_ms == pytest.approx(12)


def test_a_prefill_of_few_tokens_reads_the_weights_of_this_machine_too():
    measured = Times(400.0, 900.0, 120.0, 12.0, 576, 70, 662)
    times = scale(measured, SMALL, SMALL, Request(text_tokens=1, answer_tokens=32))
    assert times.text_prefill_ms == times.token_ms > 10  # 1.7 ms by operations


def test_twice_the_layers_take_twice_the_prefill():
    shape = SHAPES["small"]
    double = replace(shape, text=replace(shape.text, layers=24), vision=replace(shape.vision, layers=23))
    twice = shape_needs(double, "q8_0", "f16")
    measured = Times(400.0, 900.0, 120.0, 12.0, 576, 70, 662)
    times = scale(measured, SMALL, twice, Request(text_tokens=70, answer_tokens=32))
    assert times.prefill_ms == pytest.approx(2 * 1020)
    assert times.encode_ms == pytest.approx(800, rel=0.02)  # patches and projector do not double
    assert 1.7 * 12 < times.token_ms < 2 * 12  # nor does the head


@pytest.mark.parametrize("needs", [SMALL, SEVEN, shape_needs(SHAPES["medium"], "q8_0", "f16")], ids=lambda n: n.name)
@pytest.mark.parametrize("gpu", [False, True])
def test_a_slice_has_the_widths_of_the_pair_and_at_most_half_its_layers(needs, gpu):
    shape, llm_type, mmproj_type = slice_of(needs, gpu=gpu)
    text, vision = needs.shape.text, needs.shape.vision
    assert (shape.text.width, shape.text.feed_forward, shape.text.kv_heads) == (
        text.width,
        text.feed_forward,
        text.kv_heads,
    )
    assert (shape.vision.width, shape.vision.patches) == (vision.width, vision.patches)
    assert 2 <= shape.text.layers <= text.layers // 2
    assert 2 <= shape.vision.layers <= vision.layers // 2 + 1
    assert (llm_type, mmproj_type) == (needs.llm_type, "f16")
    assert shape_needs(shape, llm_type, mmproj_type).cost.weight_bytes > 60e6  # no cache holds it


@pytest.mark.parametrize(
    ("kind", "written"), [("q4_k", "q4_0"), ("q6_k", "q8_0"), ("bf16", "bf16"), ("f32", "f16"), ("iq4_xs", "q4_0")]
)
def test_types_that_cannot_be_written_have_a_neighbour(kind, written):
    assert written_type(kind) == written


def test_apples_memory_is_shared_and_that_is_said():
    big = shape_needs(SHAPES["llava-1.5-7b"], "f16", "f16")
    prediction = predict_on(DEVICES["m1"], big, Request(ctx=8192))
    assert prediction.memory_there == pytest.approx(16 * 2**30 * 2 / 3)
    assert "about 11 of 16 GiB" in prediction.notes[-1]
    with pytest.raises(BadInput, match=r"has 11\.5 GB.*such as m1-pro"):
        check_room(prediction, [], "metal")


def test_a_mixture_of_experts_in_fewer_bits_keeps_its_experts():
    eight = shape_needs(SHAPES["llava-1.5-7b"], "q8_0", "f16")
    mixture = replace(eight, llm_bytes=8 * eight.llm_bytes)  # of which a token uses one in eight
    rest = sum(mixture.memory(4096).values()) - mixture.llm_bytes
    found = dict(_smaller(mixture, 4096))[f"{mixture.name} as q4_0"]
    assert found - rest == pytest.approx(8 * eight.llm_bytes * 18 / 34)


def test_a_request_that_the_context_cannot_hold_is_refused():
    with pytest.raises(BadParameter, match=r"takes 768 tokens.*--ctx is 512"):
        predict_on(CARD, SEVEN, Request(ctx=512))


def test_a_pair_too_big_for_a_device_is_told_what_would_fit():
    big = shape_needs(SHAPES["llava-1.5-13b"], "f16", "f16")
    prediction = predict_on(CARD, big, Request())
    assert prediction.as_dict()["fits"] is False
    with pytest.raises(BadInput, match=r"needs 30\.\d GB.*RTX 4090 has 25\.8 GB.*as q8_0 \(17\.0 GB\).*rtx-5090"):
        check_room(prediction, [("it as q8_0", 17e9), ("it as f16", 30e9)], "cuda")
    check_room(predict_on(DEVICES["h200"], big, Request()), [])
    check_room(predict_on(DEVICES["epyc-9654"], big, Request()), [])  # its memory is the machine's affair
