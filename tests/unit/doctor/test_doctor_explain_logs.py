"""Every log of tests/logs gives the cause that cases.json names, with its numbers."""

import io
import json
import re
from pathlib import Path

import pytest

from opsin.core.errors import BadInput
from opsin.doctor.explain import as_text, explain

LOGS = Path(__file__).parents[2] / "logs"
CASES = json.loads((LOGS / "cases.json").read_text())


def names(text: str) -> list[str]:
    return [cause.name for cause in explain(io.BytesIO(text.encode())).causes]


def read(name: str):
    return explain(io.BytesIO((LOGS / f"{name}.log").read_bytes()))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["cause"] != "unknown"])
def test_the_cause_is_named_with_its_cost(name: str) -> None:
    case, explanation = CASES[name], read(name)
    assert (explanation.causes[0].name if explanation.causes else None) == case["cause"]
    assert [cause.name for cause in explanation.causes[1:]] == case["also"]
    if "seconds" in case:
        assert explanation.causes[0].seconds == pytest.approx(case["seconds"], abs=0.01)
    if "tool" in case:
        assert explanation.facts.tool == case["tool"]
    for words in case.get("text", ()):
        assert words in "\n".join(as_text(explanation))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["cause"] == "unknown"])
def test_an_unknown_log_says_so(name: str) -> None:
    with pytest.raises(BadInput, match="holds nothing that opsin explain knows"):
        read(name)


def test_every_log_is_a_case_and_some_were_set_aside() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == set(CASES)
    assert all(case["source"] for case in CASES.values())
    assert sum(case.get("set_aside", False) for case in CASES.values()) >= 5


def test_the_founding_log_with_its_arithmetic() -> None:
    explanation = read("lcp-0.2.56-founding")
    first, second = explanation.causes
    rows = {row.name: row for row in explanation.stages}
    assert rows["before the timer"].ms == pytest.approx(940.43)
    assert rows["before the timer"].at_most
    assert rows["between tokens"].ms == pytest.approx(24_245.02)
    assert sum(row.ms for row in explanation.stages) == pytest.approx(91_750)
    assert first.seconds == pytest.approx(91.75 - 2.63, abs=0.01)
    assert "658 prompt + 3,438 answer = 4,096 tokens" in first.arithmetic
    assert "0.94 + 64 × 0.02641 = 2.6 s" in first.arithmetic
    assert second.arithmetic == (
        "90,809.57 total − 64,415.00 eval − 2,149.55 sample − 0.00 prompt = 24,245 ms, 7.05 ms a token"
    )
    assert explanation.notes[0].startswith("Vision took at most 0.94 s: 91.75 s")


@pytest.mark.parametrize(
    ("name", "old", "new", "gone"),
    [
        ("lcp-0.2.56-founding", "3438, 'total_tokens': 4096", "3439, 'total_tokens': 4097", "runaway"),
        ("llama-server-0c1e570-runaway", "n_ctx_slot = 512|n_ctx = 512|truncated = 1", "n_ctx_slot = 4096", "runaway"),
        ("qwen2vl-cli-11250-clip-cpu", "CLIP using CPU", "CLIP using CUDA0", "encoder_on_cpu"),
        ("qwen2vl-cli-11250-clip-cpu", "offloaded 29/29", "offloaded 0/29", "encoder_on_cpu"),
        ("ollama-16496-limited-vram", "disabling multimodal projector offload", "…", "projector_parked"),
        ("ollama-12303-no-gpu", "offloaded 0/35", "offloaded 35/35", "no_gpu"),
        ("ollama-9311-load", "79065586400", "7906558640", "model_load"),
        ("llama-server-0c1e570-threads", "n_threads = 16", "n_threads = 2", "threads"),
        ("llama-server-0c1e570-batch", "n_tokens_batch = 16", "n_tokens_batch = 512", "small_batches"),
        ("llama-server-27147-first-image", "1180.00 ms /", "800.00 ms /", "first_image"),
        ("mtmd-cli-18327-unsupported-op", "unsupported op", "op", "unsupported_ops"),
        ("llama-server-5553-cpu", "429987.864,\n", "42998.7,\n", "prefill_slow"),
        ("llama-server-22582-no-flash", "--flash-attn off", "--flash-attn on", "no_flash_attention"),
        ("llama-server-14111-kv-full", "failed to find a memory slot", "…", "kv_full"),
        ("llama-bench-debug-build", r"asserts enabled|debug build|\(debug\)", "…", "debug_build"),
        ("time-v-paging", "page faults: 912345", "page faults: 12", "paging"),
    ],
)
def test_without_its_reason_a_cause_is_not_named(name: str, old: str, new: str, gone: str) -> None:
    text = (LOGS / f"{name}.log").read_text()
    assert gone in names(text)
    assert gone not in names(re.sub(old, new, text))


def test_time_in_no_timer_is_not_called_healthy() -> None:
    text = (LOGS / "ollama-1806-healthy-verbose.log").read_text().replace("5.088275983s", "15.088275983s")
    found = explain(io.BytesIO(text.encode()))
    assert [cause.name for cause in found.causes] == ["unaccounted"]
    assert found.causes[0].seconds == pytest.approx(10.0, abs=0.01)


def test_a_request_that_waited_for_others_is_told() -> None:
    account = json.loads((LOGS / "opsin-ask.log").read_text())
    account["stages"].update(queue_ms=4000.0, total_ms=4240.0)
    found = explain(io.BytesIO(json.dumps(account).encode()))
    assert [cause.name for cause in found.causes] == ["queue"]


def test_a_device_without_memory_or_flash_attention_is_told() -> None:
    head = "clip_ctx: CLIP using Vulkan0 backend\n"
    lines = {
        "out_of_memory": "ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory\n",
        "no_flash_attention": "warmup: WARNING: flash attention not supported by Vulkan0, memory usage will increase\n",
    }
    for name, line in lines.items():
        assert [cause.name for cause in explain(io.BytesIO((head + line).encode())).causes] == [name]


def test_an_encode_that_is_told_is_not_counted_once_more_by_the_clock() -> None:
    text = (LOGS / "mtmd-cli-0c1e570-healthy.log").read_text()
    text += "0.03.050.000 I decoding image batch 1/1, n_tokens_batch = 36\n"
    text += "0.03.060.000 I image decoded (batch 1/1) in 9 ms\n"
    assert explain(io.BytesIO(text.encode())).facts.worst.encode_ms == (723.0,)


def test_what_is_only_bounded_gives_way_to_what_is_known() -> None:
    threads = "system_info: n_threads = 16 / 4\n"
    founding = (LOGS / "lcp-0.2.56-founding.log").read_text()
    explanation = explain(io.BytesIO((threads + founding).encode()))
    assert [(cause.name, cause.at_most) for cause in explanation.causes] == [
        ("runaway", False),
        ("between_tokens", False),
        ("threads", True),
    ]
    assert "3. threads  ≤66.56 s" in as_text(explanation)
    slow = "llama_perf_context_print: eval time = 4000.00 ms / 8 runs\n"
    encode = "mtmd batch encoding done in 600 ms\nwarmup: flash attention is disabled\n"
    assert names(threads + encode + slow) == ["threads", "no_flash_attention"]


def test_threads_of_a_processor_with_nothing_to_compute_are_no_cause() -> None:
    text = (LOGS / "unseen-llama-server-threads.log").read_text()
    assert names(text + "load_tensors: offloaded 20/33 layers to GPU\n") == ["partial_offload", "threads"]
    assert names(text + "load_tensors: offloaded 33/33 layers to GPU\n") == []


def test_a_slow_prompt_on_a_gpu_is_not_laid_to_the_cpu() -> None:
    text = (LOGS / "llava-cli-8984-cpu.log").read_text()
    here, there = (
        explain(io.BytesIO((text + more).encode())).causes[0] for more in ("", "offloaded 33/33 layers to GPU")
    )
    assert here.name == there.name == "prefill_slow"
    assert "CPU" in here.message
    assert "-ngl" in here.remedy
    assert "CPU" not in there.message
    assert "-ngl" not in there.remedy


@pytest.mark.parametrize(("tokens", "found"), [((600, 600, 610, 600), ["first_image"]), ((2500, 600, 610, 600), [])])
def test_a_first_image_is_compared_with_those_of_its_size(tokens: tuple[int, ...], found: list[str]) -> None:
    request = (
        "slot launch_slot_: id 0 | task {0} | processing task\nimage slice encoded in {1} ms\n"
        "slot print_timing: id 0 | task {0} | prompt eval time = {2}.00 ms / {3} tokens\n"
        "slot print_timing: id 0 | task {0} | eval time = 100.00 ms / 10 tokens\n"
    )
    encodes = [(900, 1200), (400, 700), (400, 700), (410, 710)]
    parts = [request.format(n, *ms, count) for n, (ms, count) in enumerate(zip(encodes, tokens, strict=True))]
    assert names("".join(parts)) == found


def test_a_batch_that_found_its_place_when_tried_again_is_no_loss() -> None:
    head = "slot launch_slot_: id  0 | task 1 | processing task\n"
    full = "decode: failed to find a memory slot for batch of size 512\n"
    again = "srv  update_slots: failed to find free space in the KV cache, retrying with smaller batch size, off = 0\n"
    times = "slot print_timing: id  0 | task {0} | prompt eval time = {0}00.00 ms / 512 tokens\n"
    assert names(head + full + again + times.format(1)) == []
    assert names(head + full + times.format(1)) == ["kv_full"]
    # It is told, too, where another request is the slowest one.
    both = explain(io.BytesIO((head + full + head.replace("1", "9") + times.format(9)).encode()))
    assert [(cause.name, cause.seconds) for cause in both.causes] == [("kv_full", None)]


def test_after_the_first_request_a_cached_prompt_may_be_text() -> None:
    founding = (LOGS / "lcp-0.2.56-founding.log").read_text()
    small = founding.replace("91.75s", "90.99s").replace("3438,", "3437,").replace("4096", "4095")
    notes = explain(io.BytesIO((small + founding).encode())).notes
    assert any(note.startswith("Image and prompt took at most 0.94 s") for note in notes)
    notes = explain(io.BytesIO((small + "image slice encoded in 5 ms\n" + founding).encode())).notes
    assert any(note.startswith("Vision took at most 0.94 s") for note in notes)
