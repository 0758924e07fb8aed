"""Past predictions: kept, read again, and summed up as errors."""

import pytest

from opsin.core.errors import BadInput
from opsin.tune.history import Checked, past_errors, read_history, remember, stage_times, table_errors
from opsin.tune.predict import Times

MEASURED = {"encode": 400.0, "prefill": 1000.0, "decode": 10.0}


def checked(**predicted):
    return Checked("a machine", "small", predicted, MEASURED, {"date": "2026-11-22", "opsin": "0.1.0"})


def test_errors_have_a_sign_and_are_shares_of_what_was_measured():
    errors = checked(encode=440.0, prefill=900.0, decode=10.0).errors
    assert errors == pytest.approx({"encode": 0.1, "prefill": -0.1, "decode": 0.0})


def test_a_stage_that_was_not_measured_has_no_error():
    row = Checked("a machine", "text only", {"encode": 0.0, "decode": 11.0}, {"encode": 0.0, "decode": 10.0}, {})
    assert set(row.errors) == {"decode"}


def test_what_is_remembered_is_read_again(tmp_path):
    path = tmp_path / "deep" / "predictions.jsonl"
    rows = [checked(encode=440.0, prefill=900.0, decode=10.0), checked(encode=360.0, prefill=1300.0, decode=9.0)]
    for row in rows:
        assert remember(row, path) == path
    assert read_history(path) == rows


def test_broken_lines_are_left_out(tmp_path):
    path = tmp_path / "predictions.jsonl"
    row = checked(encode=440.0, prefill=900.0, decode=10.0)
    remember(row, path)
    with path.open("a") as file:
        file.write('{"machine": "cut of\n[1]\n{"machine": "x", "model": "y", "predicted_ms": {}, "measured_ms": 3}\n')
    assert read_history(path) == [row]
    assert read_history(tmp_path / "none.jsonl") == []


def test_a_history_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        remember(checked(encode=1.0), tmp_path / "file" / "predictions.jsonl")


def test_past_errors_are_medians_without_sign():
    rows = [checked(encode=440.0, prefill=900.0, decode=10.0), checked(encode=320.0, prefill=1300.0, decode=9.0)]
    found = past_errors(rows)
    assert found["encode"] == {"checks": 2, "median": pytest.approx(0.15), "largest": pytest.approx(0.2)}
    assert found["prefill"]["largest"] == pytest.approx(0.3)
    assert past_errors([]) == {}


def test_the_table_is_judged_device_by_device():
    errors = table_errors("metal")
    assert "encode" not in errors  # of one device alone nothing can be said
    assert errors["decode"]["checks"] > 20
    assert errors["decode"]["median"] < 0.15
    assert 0.2 < errors["decode"]["largest"] < 1.0
    assert set(table_errors("cuda")) == {"prefill", "decode"}


def test_prefill_is_that_of_picture_and_text():
    assert stage_times(Times(400.0, 900.0, 120.0, 12.0, 576, 70, 662)) == {
        "encode": 400.0,
        "prefill": 1020.0,
        "decode": 12.0,
    }
