"""`opsin predict` as a user types it."""

import json
import subprocess
import sys

import pytest

from opsin.models.resolve import demo_pair

DEMO = str(demo_pair().llm)


def predict(env, *arguments, code=0):
    command = [sys.executable, "-m", "opsin", "predict", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_shape_on_a_device_of_the_table(opsin_env, tmp_path):
    saved = tmp_path / "predict.json"
    arguments = ("--model", "llava-1.5-7b", "--type", "q4_0", "--device", "rtx 3090", "--json")
    document = json.loads(predict(opsin_env, *arguments, "--json-out", str(saved)).stdout)
    assert document == json.loads(saved.read_text())
    row = document["prediction"]
    assert row["device"] == "NVIDIA GeForce RTX 3090"
    assert row["image_tokens"] == 576
    assert row["fits"] is True
    assert 100 < row["decode_tokens_s"] < 250  # 936 GB/s over 3.8 GB and what was reached
    assert document["check"] is None


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--model", "qwen2.5-vl-7b"), "qwen2.5-vl-7b as q4_k_m"),
        (("--model", "Qwen2.5 VL 7B:Q8_0"), "qwen2.5-vl-7b as q8_0"),
        (("--model", "qwen2.5-vl-7b", "--type", "q5_k_m"), "qwen2.5-vl-7b as q5_k_m"),
        (("--model", "paddleocr-vl"), "paddleocr-vl as bf16"),
    ],
)
def test_a_known_name_needs_no_download(opsin_env, tmp_path, arguments, name):
    env = {**opsin_env, "HF_HUB_CACHE": str(tmp_path)}
    row = json.loads(predict(env, *arguments, "--device", "rtx 3090", "--json").stdout)["prediction"]
    assert row["model"] == name
    assert row["image_tokens"] == 391
    assert row["encode_ms"] > 1
    assert "640×480" in row["notes"][0]


def test_text_for_people(opsin_env):
    shown = predict(opsin_env, "--model", "medium", "--device", "m2 max", "--answer-tokens", "1000").stdout
    for words in (
        "Apple M2 Max",
        "encode an image",
        "tokens a second",
        "it fits",
        "Metal gives models about 72 of 96 GiB",
    ):
        assert words in shown
    assert "of 51.5 GB" in predict(opsin_env, "--model", "medium", "--device", "m2 max", "--memory", "64").stdout


def test_the_table(opsin_env):
    assert "NVIDIA H200" in predict(opsin_env, "--devices").stdout
    rows = json.loads(predict(opsin_env, "--devices", "--json").stdout)
    assert {"name", "bandwidth", "rate", "memory"} <= set(rows[0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "small", "--device", "rtx 4080"), "nearest are rtx-4090"),
        (("--model", DEMO, "--type", "q4_0", "--device", "m1"), "a file has its own"),
        (("--model", "small", "--type", "q5_k", "--device", "m1"), "--type cannot be 'q5_k'"),
        (("--model", "small", "--device", "m1", "--measure"), "--measure needs the machine at hand"),
        (("--model", "small", "--measure"), "there are none of small"),
        (("--model", "small", "--mmproj", "x.gguf", "--device", "m1"), "leave out --mmproj"),
        (("--model", "small", "--device", "m1", "--ctx", "512"), "give a larger --ctx"),
        (("--model", "small", "--device", "m1", "--kv-type", "q5"), "kv_type must be 'f16'"),
        (("--model", "llava-1.5-13b", "--type", "f16", "--device", "l4"), "what would fit is"),
        (("--model", "llava-1.5-7b", "--device", "rtx 3090", "--memory", "1"), "what would fit is"),
    ],
)
def test_what_cannot_be_is_one_sentence(opsin_env, arguments, sentence):
    done = predict(opsin_env, *arguments, code=2)
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_this_machine_is_measured_and_checked(opsin_env):
    """Times of the demo model say nothing about accuracy; that all of it is there does."""
    document = json.loads(predict(opsin_env, "--model", DEMO, "--ctx", "512", "--json", "--measure").stdout)
    check, row = document["check"], document["prediction"]
    for stage in ("encode_ms", "prefill_ms", "decode_token_ms"):
        predicted, measured = check["predicted_ms"][stage], check["measured_ms"][stage]
        assert min(predicted, measured) > 0
        assert check["errors"][stage] == pytest.approx(predicted / measured - 1, abs=0.02)
    assert row["device"].startswith("this machine (")
    assert row["fits"] is True
    assert row["image_tokens"] == check["image_tokens"] == 36
    assert row["first_token_ms"] < row["answer_ms"]


def test_a_language_model_alone_is_measured_too(opsin_env, tmp_path):
    llm = tmp_path / "alone.gguf"
    llm.write_bytes(demo_pair().llm.read_bytes())
    document = json.loads(predict(opsin_env, "--model", str(llm), "--ctx", "512", "--json", "--measure").stdout)
    assert document["prediction"]["encode_ms"] == document["check"]["measured_ms"]["encode_ms"] == 0
    # Each question is new: none finds what another left in the KV cache.
    assert document["check"]["measured_ms"]["prefill_ms"] > 0
