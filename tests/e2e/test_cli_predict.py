"""`opsin predict` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "src" / "opsin" / "models" / "demo" / "opsin-demo.gguf"


def predict(env, *arguments, code=0):
    command = [sys.executable, "-m", "opsin", "predict", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_shape_on_a_device_of_the_table(opsin_env, tmp_path):
    saved = tmp_path / "predict.json"
    arguments = (
        "--model",
        "llava-1.5-7b",
        "--type",
        "q4_0",
        "--device",
        "rtx 3090",
        "--json",
        "--json-out",
        str(saved),
    )
    document = json.loads(predict(opsin_env, *arguments).stdout)
    assert document == json.loads(saved.read_text())
    row = document["prediction"]
    assert row["device"] == "NVIDIA GeForce RTX 3090"
    assert row["image_tokens"] == 576
    assert row["fits"] is True
    assert 100 < row["decode_tokens_s"] < 250  # 936 GB/s over 3.8 GB and what was reached
    assert row["shares"]["decode"]["sources"]
    assert document["check"] is None
    assert document["table_errors"]["decode"]["checks"] > 10
    assert "past_errors_here" not in document


def test_text_for_people(opsin_env):
    shown = predict(opsin_env, "--model", "medium", "--device", "m2 max", "--ctx-used", "1000").stdout
    for words in (
        "Apple M2 Max",
        "encode a picture",
        "tokens a second",
        "it fits",
        "of the roofline",
        "each metal device by the others: prefill",
        "Metal gives models about 72 of 96 GiB",
    ):
        assert words in shown
    assert "past errors here" not in shown
    assert "of 51.5 GB" in predict(opsin_env, "--model", "medium", "--device", "m2 max", "--memory", "64").stdout


def test_the_table(opsin_env):
    assert "NVIDIA H200" in predict(opsin_env, "--devices").stdout
    rows = json.loads(predict(opsin_env, "--devices", "--json").stdout)
    assert {"name", "bandwidth", "rate", "source"} <= set(rows[0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "small", "--device", "rtx 4080"), "nearest are rtx-4090"),
        (("--model", str(DEMO), "--type", "q4_0", "--device", "m1"), "a file has its own"),
        (("--model", "small", "--type", "q5_k", "--device", "m1"), "--type cannot be 'q5_k'"),
        (("--model", "small", "--device", "m1", "--measure"), "--measure needs the machine at hand"),
        (("--model", "small", "--device", "m1", "--threads", "2"), "--threads needs the machine at hand"),
        (("--model", "small", "--device", "m1", "--threads", "2", "--rounds", "2"), "--threads and --rounds need the"),
        (("--model", "small", "--device", "m1", "--ctx", "512"), "give a larger --ctx"),
        (("--model", "small", "--device", "m1", "--kv-type", "q5"), "--kv-type cannot be 'q5'"),
        (("--model", "llava-1.5-13b", "--type", "f16", "--device", "l4"), "what would fit is"),
        (("--model", "llava-1.5-7b", "--memory", "1"), "what would fit is"),
    ],
)
def test_what_cannot_be_is_one_sentence(opsin_env, arguments, sentence):
    done = predict(opsin_env, *arguments, code=2)
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_this_machine_is_measured_checked_and_remembered(opsin_env, tmp_path):
    """Times of a tiny pair say nothing about accuracy; that all of it is there, and that errors are kept, does."""
    env = {**opsin_env, "XDG_DATA_HOME": str(tmp_path)}
    common = ("--model", "tiny", "--ctx", "512", "--threads", "1", "--rounds", "1", "--json")
    first = json.loads(predict(env, *common, "--measure").stdout)
    check, row = first["check"], first["prediction"]
    assert all(
        check[side][stage] > 0 for side in ("predicted_ms", "measured_ms") for stage in ("encode", "prefill", "decode")
    )
    assert check["errors"]["decode"] == pytest.approx(
        check["predicted_ms"]["decode"] / check["measured_ms"]["decode"] - 1, abs=1e-3
    )
    assert row["image_tokens"] == 16
    assert row["first_token_ms"] < row["answer_ms"]
    assert first["past_errors_here"]["decode"]["checks"] == 1
    again = json.loads(predict(env, *common).stdout)
    assert again["check"] is None
    assert again["past_errors_here"] == first["past_errors_here"]
