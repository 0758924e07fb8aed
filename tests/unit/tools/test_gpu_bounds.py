"""scripts/gpu/bounds.py: which bounds the results of a run keep, from documents that are made up."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "gpu" / "bounds.py"
NAMES = ("placed", "caught", "founding", "decode", "streams", "W3", "W4")


def doctor(status: str, **backends: float) -> dict[str, Any]:
    evidence = {"backends": {name: {"share_of_ops": share} for name, share in backends.items()}}
    parts = ("placement.encoder", "placement.language_model")
    return {"checks": [{"name": name, "status": status, "evidence": evidence} for name in parts]}


def ratios(**figures: dict[str, float | None]) -> dict[str, Any]:
    return {"ratios": {"llama-server": figures}}


def results(**changed: Any) -> dict[str, Any]:
    found = {
        "doctor.out": doctor("ok", CUDA0=0.98, CPU=0.02),
        "encoder_on_cpu.out": doctor("fail", CPU=1.0),
        "founding.json": {
            "model": {"llm_file": "llava-1.5-7b-q4_0.gguf"},
            "ceilings": {"device": "CUDA0 (NVIDIA H200)"},
            "warm": {"wall_ms": 390.0},
        },
        "bench.json": ratios(
            W1={"token_ms": 2.0, "total_s": 1.0}, W3={"total_s": 0.24}, W4={"first_token_ms": 0.61, "total_s": 0.5}
        ),
        "long-64.json": ratios(W1={"token_ms": 1.25}),
        "long-128.json": ratios(W1={"token_ms": 1.0}),
        "batched-32.json": {"of_llama_batched_bench": 0.95},
    }
    return {
        **found,
        **{name.replace("_json", ".json").replace("_out", ".out"): value for name, value in changed.items()},
    }


def told(folder: Path, documents: dict[str, Any]) -> tuple[dict[str, tuple[float | None, str]], str]:
    for name, document in documents.items():
        if document is not None:
            text = document if isinstance(document, str) else json.dumps(document)
            (folder / name).write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=True)
    found = json.loads((folder / "bounds.json").read_text(encoding="utf-8"))
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:]] == [one["kept"] for one in found["bounds"]]
    rows = zip(NAMES, found["bounds"], strict=True)
    return {name: (row["value"], row["kept"]) for name, row in rows}, done.stdout


def test_figures_are_read_and_compared(tmp_path: Path) -> None:
    found, text = told(tmp_path, results())
    assert found == {
        "placed": (0.98, "yes"),
        "caught": (1.0, "yes"),
        "founding": (0.39, "yes"),
        "decode": (1.0, "yes"),
        "streams": (0.95, "yes"),
        "W3": (0.24, "yes"),
        "W4": (0.61, "no"),
    }
    assert text.startswith("llava-1.5-7b-q4_0.gguf on CUDA0 (NVIDIA H200)\n")


def test_what_was_not_measured_is_neither_yes_nor_no(tmp_path: Path) -> None:
    found, text = told(tmp_path, {"batched-32.json": '{"of_llama'})
    assert set(found.values()) == {(None, "not measured")}
    assert "unknown pair" in text


@pytest.mark.parametrize(
    ("changed", "name", "expected"),
    [
        # Without a GPU all operations are on the CPU, where doctor has nothing to say against it.
        ({"doctor_out": doctor("ok", CPU=1.0)}, "placed", (0.0, "no")),
        ({"doctor_out": doctor("fail", CUDA0=1.0)}, "placed", (0.0, "no")),
        ({"encoder_on_cpu_out": doctor("ok", CPU=1.0)}, "caught", (0.0, "no")),
        ({"doctor_out": {"checks": []}}, "placed", (None, "not measured")),
        ({"founding_json": {"warm": {"wall_ms": 401}}}, "founding", (0.401, "no")),
        # The longest answers count.
        ({"long-128_json": None}, "decode", (0.8, "no")),
        ({"long-128_json": None, "long-64_json": ratios(W1={"token_ms": None})}, "decode", (0.5, "no")),
        # Measured without llama-server, or without its bench.
        ({"bench_json": {"workloads": {}}}, "W3", (None, "not measured")),
        ({"bench_json": ratios(W3={"total_s": None})}, "W3", (None, "not measured")),
        ({"batched-32_json": {"tokens_s": 100.0}}, "streams", (None, "not measured")),
    ],
)
def test_each_bound(tmp_path: Path, changed: dict[str, Any], name: str, expected: tuple[float | None, str]) -> None:
    assert told(tmp_path, results(**changed))[0][name] == expected


def test_a_folder_is_needed() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "bounds: name the folder of results\n")
