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
    assert device.rate >= device.fp32 > 1e11
    assert re.search(r"20\d\d", device.source)
    assert (device.memory == 0) == (device.kind == "cpu")


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda a: f"{a.device}-{a.stage}-{a.weight_type}")
def test_no_measurement_reached_more_than_the_data_sheet_allows(anchor):
    """A share above 1 means that the device, the type or the bytes of an anchor are wrong.

    But for prefill of quantised weights on CUDA: int8 tensor cores multiply them at up to four times the fp16 rate.
    """
    assert re.search(r"20\d\d", anchor.source)
    int8 = anchor.stage == "prefill" and anchor.weight_type != "f16" and DEVICES[anchor.device].kind == "cuda"
    assert 0.02 < anchor_share(anchor) < (4.0 if int8 else 1.0)


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
    ],
)
def test_devices_are_found_as_people_write_them(given, name):
    assert find_device(given).name == name


def test_an_unknown_device_gets_the_nearest_names():
    with pytest.raises(BadParameter, match=r"rtx-4090.*--devices.*--device this"):
        find_device("rtx 4080")


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


def test_a_type_nobody_measured_is_said():
    share = share_of(DEVICES["m3"], "decode", "q8_0")
    assert share.note is not None
    assert "q8_0" in share.note


def test_a_kind_without_an_encode_takes_its_prefill_and_says_so():
    anchors = [anchor for anchor in ANCHORS if anchor.stage != "encode"]
    share = share_of(DEVICES["m4"], "encode", "f16", anchors)
    prefill = share_of(DEVICES["m4"], "prefill", "f16", anchors)
    assert share.value == prefill.value
    assert share.note is not None
    assert "prefill" in share.note


def test_without_any_measurement_nothing_is_made_up():
    alien = replace(DEVICES["h200"], kind="npu")
    with pytest.raises(BadInput, match="--device this"):
        share_of(alien, "decode", "f16")
