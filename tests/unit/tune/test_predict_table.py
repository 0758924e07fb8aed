"""The table of devices, what was measured on them, and the shares of the roofline that follow."""

import re
from dataclasses import replace

import pytest

from opsin.core.errors import BadInput, BadParameter
from opsin.tune.device_table import ANCHORS, DEVICES, find_device
from opsin.tune.predict import anchor_share, share_of


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_every_device_has_rates_and_a_dated_source(device):
    assert device.bandwidth > 10e9
    assert device.rate > 1e11
    assert re.search(r"20\d\d", device.source)
    assert (device.memory == 0) == (device.kind == "cpu")


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda a: f"{a.device}-{a.stage}-{a.weight_type}")
def test_no_measurement_reached_more_than_the_data_sheet_allows(anchor):
    """A share above 1 means that the device, the type or the bytes of an anchor are wrong.

    But for prefill of quantised weights on CUDA: int8 tensor cores multiply them at up to four times the fp16 rate.
    """
    assert re.search(r"20\d\d", anchor.source)
    int8 = anchor.stage == "prefill" and anchor.weight_type != "f16" and DEVICES[anchor.device].kind == "cuda"
    assert anchor_share(anchor) < (4.0 if int8 else 1.0)


@pytest.mark.parametrize(("kind", "close"), [("cuda", 0.9), ("metal", 0.9), ("cpu", 0.5)])
def test_a_measurement_follows_from_those_of_other_devices(kind, close):
    """Within a factor of 1.5, but for some; a wrong device, type or unit is further off than that."""
    ratios = []
    for row in ANCHORS:
        others = [other for other in ANCHORS if other.device != row.device]
        if DEVICES[row.device].kind == kind and any(
            other.stage == row.stage and DEVICES[other.device].kind == kind for other in others
        ):
            found = share_of(DEVICES[row.device], row.stage, row.weight_type, others)
            ratios.append(anchor_share(row) / found.value)
    assert len(ratios) >= 12
    assert all(1 / 2.6 < ratio < 2.6 for ratio in ratios)
    assert sum(1 / 1.5 < ratio < 1.5 for ratio in ratios) >= close * len(ratios)


def test_a_share_is_what_arithmetic_by_hand_says():
    anchor = next(a for a in ANCHORS if a.device == "rtx-4090" and a.stage == "decode" and a.weight_type == "f16")
    # 6.607 billion weights of 2 bytes, 64 tokens of 2 * 4096 * 32 values of 2 bytes, 1,008 GB/s.
    assert anchor_share(anchor) == pytest.approx(61.03 * (6.607e9 * 2 + 64 * 2 * 4096 * 32 * 2) / 1008e9, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("5090", "rtx-5090"),
        ("Apple M2 Max", "m2-max"),
        ("h100", "h100-sxm"),
        ("A100", "a100-80gb-sxm"),
        ("m1", "m1"),
        ("EPYC 7763", "epyc-7763"),
        ("5950x", "ryzen-5950x"),
        ("i7 12700", "core-i7-12700"),
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


def test_the_families_of_the_issue_are_there():
    wanted = "rtx-3090 rtx-4090 rtx-5090 a100-40gb h100-pcie h100-sxm h200 l4 m1 m1-ultra m2-pro m3-max m4 m4-max"
    assert set(wanted.split()) <= set(DEVICES)


def test_a_share_comes_from_the_device_itself_where_it_was_measured():
    share = share_of(DEVICES["rtx-4090"], "decode", "f16")
    assert share.note is None
    assert share.value == share.least == share.most
    assert len(share.sources) == 1


def test_a_share_comes_from_the_kind_where_the_device_was_not_measured():
    share = share_of(DEVICES["l4"], "decode", "q4_0")
    rows = [a for a in ANCHORS if a.stage == "decode" and a.weight_type == "q4_0" and a.device.startswith("rtx")]
    assert [share.least, share.most] == sorted(map(anchor_share, rows))[:: len(rows) - 1]
    assert share.least < share.value < share.most
    assert share.note is None


def test_cards_with_hbm_reach_less_of_their_bandwidth_than_others():
    """One answer at a time does not fill them: a share from gaming cards would promise three times too much."""
    hbm, gaming = (share_of(DEVICES[name], "decode", "q4_0") for name in ("h100-pcie", "rtx-4090"))
    assert hbm.most < gaming.value
    assert hbm.note is not None


def test_chips_that_are_two_reach_less_of_their_bandwidth_than_one():
    """An M3 Ultra decodes Llama 2 7B in q4_0 with 92 tokens a second; a Max chip's share would promise 150."""
    ultra, other = (share_of(DEVICES[name], "decode", "q4_0") for name in ("m3-ultra", "m3-max"))
    assert ultra.value < 0.7 * other.value
    assert ultra.note is None
    encode = share_of(DEVICES["m3-ultra"], "encode", "f16")
    assert encode.note is not None
    assert "devices of another sort: m2-max" in encode.note


def test_devices_count_alike_however_often_they_were_measured():
    rows = [a for a in ANCHORS if a.device in {"ryzen-7950x", "epyc-zen3-2-cores"}]
    rows = [a for a in rows if (a.stage, a.weight_type) == ("decode", "q8_0")]
    often = [row for row in rows if row.device == "epyc-zen3-2-cores"]
    assert len(often) > 1
    once = next(row for row in rows if row.device == "ryzen-7950x")
    middle = sorted(map(anchor_share, often))[len(often) // 2]
    share = share_of(DEVICES["epyc-9354"], "decode", "q8_0", rows)
    assert share.value == pytest.approx((anchor_share(once) + middle) / 2)


def test_a_type_nobody_measured_is_said():
    share = share_of(DEVICES["l4"], "decode", "q5_0")
    assert share.note is not None
    assert "q5_0" in share.note


def test_an_encode_is_never_taken_from_a_prefill():
    """Prefill of int8 weights says nothing of an encoder in f16."""
    share = share_of(DEVICES["xeon-8480"], "encode", "f16")
    assert share.note is None
    assert all("docs/results/predict" in source for source in share.sources)
    with pytest.raises(BadInput, match="Nothing is known yet of encode"):
        share_of(DEVICES["m4"], "encode", "f16", [anchor for anchor in ANCHORS if anchor.stage != "encode"])


@pytest.mark.parametrize(("name", "gib"), [("m1", 32 / 3), ("m3-pro", 24), ("m2-max", 72), ("rtx-4090", 24)])
def test_a_gpu_of_apple_has_a_part_of_the_memory(name, gib):
    assert DEVICES[name].usable == pytest.approx(gib * 2**30)


def test_without_any_measurement_nothing_is_made_up():
    alien = replace(DEVICES["h200"], kind="npu")
    with pytest.raises(BadInput, match="--device this"):
        share_of(alien, "decode", "f16")
