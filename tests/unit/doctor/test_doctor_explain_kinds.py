"""One small log, written here in the format of its tool, for each kind of fault that public logs show."""

import io
import json

import pytest

from opsin.core.errors import BadInput
from opsin.doctor.explain import as_text, explain

SLOT = "slot print_timing: id  0 | task {0} | "
TIMES = (
    SLOT
    + "prompt eval time = {1:10.2f} ms / {2:5d} tokens\n"
    + SLOT
    + "       eval time = {3:10.2f} ms / {4:5d} tokens\n"
)
GIN = '[GIN] 2026/08/19 - 08:08:40 | {} | {:>13} |       127.0.0.1 | POST     "/api/chat"\n'
OLLAMA = "time=2026-08-19T08:0{0}:{1:06.3f}Z level=INFO source={2} msg={3}\n"
SHIFT = '"context limit hit - shifting" id=0 limit=8192 input=8192 keep=5 discard=4093'
STARTED = OLLAMA.format(8, 36, "llama_server.go:1362", '"llama-server started in 28.08 seconds"')
OLD_STARTED = OLLAMA.format(8, 36, "server.go:637", '"llama runner started in 28.08 seconds"')
LM = "2026-06-05 10:33:08 [DEBUG]\n"


def read(text: str):
    return explain(io.BytesIO(text.encode()))


def names(text: str) -> list[str]:
    return [cause.name for cause in read(text).causes]


def shown(text: str) -> str:
    return "\n".join(as_text(read(text)))


# ---- loads, and lines of HTTP servers


@pytest.mark.parametrize("started", [STARTED, OLD_STARTED])
def test_a_load_of_ollama_is_joined_to_its_request(started: str) -> None:
    found = read(started + GIN.format(200, "30.0816407s"))
    assert [(cause.name, cause.seconds) for cause in found.causes] == [("model_load", 28.08)]
    assert [(row.name, round(row.ms)) for row in found.stages] == [("load model", 28_080), ("not timed", 2_002)]
    assert "keep_alive" in found.causes[0].remedy


def test_a_load_and_the_timers_of_llama_server_are_one_request_of_ollama() -> None:
    total = SLOT.format(0) + "      total time =    2000.00 ms /   120 tokens\n"
    found = read(STARTED + TIMES.format(0, 500, 100, 1500, 20) + total + GIN.format(200, "30.5s"))
    assert (found.facts.count, found.facts.tool) == (1, "Ollama")
    assert {row.name: row.ms for row in found.stages}["load model"] == 28_080
    assert [cause.name for cause in found.causes] == ["model_load"]


def test_a_load_longer_than_the_request_was_another_s() -> None:
    assert read(STARTED + GIN.format(200, "2.1s")).facts.worst.joined_ms is None


def test_loads_again_and_again_are_told_without_a_certain_count() -> None:
    lines = [OLLAMA.format(m, 2.735, "server.go:1339", f'"llama runner started in {s} seconds"') for m, s in
             ((9, 29.96), (9, 29.96), (8, 30.46), (7, 30.22))]  # fmt: skip
    found = read("".join(lines))
    assert found.causes[0].name == "model_load"
    assert found.causes[0].at_most
    assert "about 3 loads of 30.0 to 30.5 s" in found.verdict
    assert "num_ctx" in found.causes[0].remedy


def test_a_lone_line_of_http_is_no_data() -> None:
    found = read(GIN.format(200, "5m30s"))
    assert found.causes == ()
    assert found.verdict.startswith("No data: the log has the time of a whole request (330.00 s)")
    assert found.as_dict()["healthy"] is False


def test_requests_refused_again_and_again_are_told_with_the_server_s_words() -> None:
    error = 'srv    operator(): got exception: {"error":{"code":400,"message":"prefill is wrong.","type":"x"}}\n'
    line = "srv  log_server_r: done request: POST /v1/chat/completions 127.0.0.1 400\n"
    found = read(TIMES.format(1, 26636.81, 612, 5028.35, 26) + (error + line) * 2)
    assert [cause.name for cause in found.causes] == ["prefill_slow", "decode_slow", "refused"]
    assert "2 requests were refused with an HTTP error (2 × 400): prefill is wrong." in found.causes[2].message
    assert names((error + line) * 2) == ["refused"]
    assert names(GIN.format(400, "1ms") * 3 + GIN.format(200, "1s")) == ["refused"]
    with pytest.raises(BadInput):
        read('10.0.0.1 "GET /index.html HTTP/1.1" 404 12\n' * 3)


def test_a_model_that_does_not_load_in_time_is_told() -> None:
    line = OLLAMA.format(8, 1, "sched.go:1", '"error loading" error="timed out waiting for llama-server to start"')
    assert names(line + GIN.format(500, "5m0s")) == ["load_failed"]


# ---- slow stages that no line explains


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image slice encoded in 300 ms\nimage decoded (batch 1/1) in 1400 ms\n", "dominates: image prefill (1.40"),
        (TIMES.format(1, 6500, 1900, 900, 30), "dominates: prompt (6.50 of 7.40 s"),
        (TIMES.format(1, 5200, 1900, 6000, 120), "stands out: prompt (5.20 of 11.20 s"),
    ],
)
def test_a_slow_stage_is_never_called_healthy(text: str, words: str) -> None:
    found = read(text)
    assert found.causes == ()
    assert found.as_dict()["healthy"] is False
    assert found.verdict.startswith("No known cause; this stage ")
    assert words in found.verdict


def test_a_decode_under_ten_tokens_a_second_is_slow_and_one_above_is_not() -> None:
    assert names(TIMES.format(1, 100, 30, 3000, 29)) == ["decode_slow"]
    assert names(TIMES.format(1, 100, 30, 3000, 31)) == []


def test_a_huge_prompt_at_a_good_speed_is_long_not_slow() -> None:
    found = read(TIMES.format(1, 36815.18, 80064, 1824.19, 90))
    assert [cause.name for cause in found.causes] == ["long_prompt"]
    assert "80,064 tokens at 2,174.8 a second" in found.verdict


def test_a_line_of_warning_is_not_healthy_unless_it_is_known_to_be_harmless() -> None:
    times = TIMES.format(1, 100, 60, 1000, 60)
    assert read(times).verdict.startswith("Healthy")
    strange = read("0.01.000.000 W load: something is odd\n" + times)
    assert strange.verdict.startswith("No known cause, but a warning in line 1")
    harmless = "0.01.000.000 W slot update_slots: id  0 | task 1 | restored context checkpoint (pos_min = 4)\n"
    assert read(harmless + times).verdict.startswith("Healthy")


def test_time_that_ollama_does_not_count_is_told() -> None:
    text = '{(...) total_duration":8139553772,  # 8,13 s\n"load_duration":44643610,\n"prompt_eval_count":63859,\n'
    found = read(text + '"prompt_eval_duration":205727569,\n"eval_count":82,\n"eval_duration":2676314808}\n')
    assert [(cause.name, cause.seconds) for cause in found.causes] == [("unaccounted", 5.213)]
    assert "counts cached tokens" in found.notes[-1]


# ---- unfinished runs


def test_an_unfinished_answer_is_read_from_its_progress() -> None:
    line = LM + "53.{0:02d}.807.885 I slot print_timing: id  0 | task 0 | n_decoded =   {1}, tg =   3.62 t/s\n"
    found = read(line.format(20, 1227) + line.format(27, 1238))
    assert found.facts.tool == "LM Studio"
    assert [cause.name for cause in found.causes] == ["decode_slow"]
    assert found.causes[0].seconds == pytest.approx(1238 / 3.62, abs=0.01)
    assert "1,238 tokens at 3.62 a second so far" in found.verdict
    assert "GPU Offload" in found.causes[0].remedy
    newer = SLOT.format(0) + "n_gen =  23800, tg =  30.74 t/s, tg_3s =  40.51 t/s\n"
    assert "23,800 tokens at 30.7 a second so far" in read(newer).verdict


def test_an_unfinished_prompt_is_read_from_its_progress() -> None:
    newer = (
        SLOT.format(0)
        + "prompt processing, n_tokens =   2048, progress = 0.17, t =  76.30 s / 26.84 tokens per second\n"
    )
    found = read(newer)
    assert "The prompt of 2,048 tokens took 76.3 s, 26.8 a second, as on a CPU so far" in found.verdict
    older = "0.{0:02d}.000.000 I slot update_slots: id  0 | task 3 | "
    older += "prompt processing progress, n_tokens = {1}, batch.n_tokens = 512, progress = 0.{0}\n"
    assert "The prompt of 512 tokens took 20.0 s" in read(older.format(11, 512) + older.format(31, 1024)).verdict
    assert "11% of the prompt" in read(older.format(11, 512)[16:]).verdict


def test_lm_studio_s_progress_has_its_time_on_the_line_before() -> None:
    line = "2025-11-14 03:14:{0:02d}  [INFO]\n [x/y.gguf] Prompt processing progress: {1}%\n"
    found = read("".join(line.format(n, n) for n in (5, 8, 30)))
    assert found.facts.tool == "LM Studio"
    assert found.verdict == "No known cause; this stage dominates: prompt (25.00 of 25.00 s)."
    assert read("".join(line.format(n, n) for n in (5, 30)) + line.format(40, 1) + line.format(42, 9)).facts.count == 2


def test_progress_of_a_request_that_was_finished_is_not_counted() -> None:
    found = read(SLOT.format(1) + "n_decoded =    100, tg =  20.65 t/s\n" + TIMES.format(1, 100, 60, 9000, 181))
    assert (found.facts.count, found.facts.worst.eval_n, found.facts.worst.unfinished) == (1, 181, False)


# ---- context and memory


def test_an_answer_without_end_is_measured_by_its_context_shifts() -> None:
    found = read("".join(OLLAMA.format(n, 0, "cache.go:231", SHIFT) for n in range(9)))
    assert [cause.name for cause in found.causes] == ["runaway"]
    assert "At least 32,744 tokens were generated, and the context of 8,192 was full 9 times" in found.verdict
    assert found.causes[0].remedy.startswith("set num_predict")
    server = "slot context shift, n_keep = 0, n_left = 4095, n_discard = 2047\n"
    assert names(f"slot update_slots: id 0 | task 1 | {server}") == ["runaway"]


def test_a_prompt_cut_to_the_context_is_no_runaway() -> None:
    cut = OLLAMA.format(1, 0, "runner.go:128", '"truncating input prompt" limit=8192 prompt=1474469 keep=5 new=8192')
    gone = OLLAMA.format(1, 9, "routes.go:1", '"w.Write failed with write tcp: connection reset by peer"')
    found = read(cut + OLLAMA.format(1, 3, "cache.go:240", SHIFT) + gone)
    assert [cause.name for cause in found.causes] == ["prompt_cut"]
    assert "the context was full with the first token" in found.verdict
    assert "send less" in found.causes[0].remedy
    assert "client closed" in found.notes[-1]


@pytest.mark.parametrize(
    "line",
    [
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 5 MiB on device 0: cudaMalloc failed: out of memory",
        "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "error: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
        "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
        "ggml_gallocr_reserve_n: failed to allocate Vulkan0 buffer of size 4294967296",
        "alloc_tensor_range: failed to allocate CPU buffer of size 17179869184",
        'Error: model requires more system memory (18.5 GiB) than is available (12.1 GiB)"',
        "Model loading was stopped due to insufficient system resources.",
        "CUDA error: out of memory\n  current device: 0, in function ggml_backend_cuda_x",
    ],
)
def test_every_backend_runs_out_of_memory_in_its_own_words(line: str) -> None:
    assert names(line + "\n") == ["out_of_memory"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("srv  send_error: request (5403 tokens) exceeds the available context size (4096 tokens), try it", "-c"),
        ("ValueError: Requested tokens (5403) exceed context window of 4096", "5,403 > 4,096"),
        (
            "keep the first 5403 tokens when context overflows. it is loaded with context length of only 4096",
            "",
        ),
    ],
)
def test_a_prompt_longer_than_the_context_is_told(line: str, words: str) -> None:
    text = shown(line + "\n")
    assert "A prompt of 5,403 tokens was refused: the context is 4,096." in text
    assert words in text


def test_lm_studio_s_full_context_is_a_runaway() -> None:
    line = "Reached context length of 4096 tokens with model (arch: llama) that does not support it\n"
    found = read(LM + line)
    assert [cause.name for cause in found.causes] == ["runaway"]
    assert "4,096" in found.verdict
    assert "Limit Response Length" in found.causes[0].remedy


# ---- answers


def test_drafts_that_are_rejected_are_told() -> None:
    timings = {"prompt_n": 1, "prompt_ms": 228.5, "predicted_n": 200, "predicted_ms": 11082.6}
    found = read(json.dumps({**timings, "draft_n": 347, "draft_n_accepted": 65}))
    assert [cause.name for cause in found.causes] == ["low_acceptance"]
    assert "65 of 347 drafted tokens were accepted (18.7%)" in found.verdict
    line = (
        TIMES.format(0, 300, 20, 2296, 256)
        + SLOT.format(0)
        + "draft acceptance = 0.{} ( {} accepted /   259 generated)\n"
    )
    assert names(line.format(644, 167)) == []
    assert names(line.format(116, 30)) == ["low_acceptance"]


@pytest.mark.parametrize(("content", "found"), [("", ["thinking"]), ("It is a cat", [])])
def test_thinking_that_ate_the_answer_is_told(content: str, found: list[str]) -> None:
    message = {"role": "assistant", "content": content, "reasoning_content": "Hm, let me see"}
    answer = {"choices": [{"message": message, "finish_reason": "length"}], "usage": {"completion_tokens": 200}}
    timings = {"prompt_n": 40, "prompt_ms": 100.0, "predicted_n": 200, "predicted_ms": 2000.0}
    asked = {"messages": [{"role": "user", "content": "What is this?"}]}
    for indent in (None, 2):
        assert names("\n".join(json.dumps(x, indent=indent) for x in (asked, {**answer, "timings": timings}))) == found


def test_answers_that_all_end_at_one_limit_are_told() -> None:
    at = [TIMES.format(n, 100, 40, 1000, count) for n, count in enumerate((128, 128, 128))]
    assert names("".join(at)) == ["same_length"]
    assert names("".join([*at, TIMES.format(9, 100, 40, 1000, 90)])) == []


def test_the_chunks_of_a_stream_are_one_request() -> None:
    chunk = 'data: {{"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{{"delta":{{"content":"a"}}{0}}}],'
    chunk += '"timings":{{"prompt_n":40,"prompt_ms":100.5,"predicted_n":{1},"predicted_ms":{2}.25}}}}\n'
    ends = ',"finish_reason":"stop"'
    text = "".join(chunk.format(ends if n == 50 else "", n, n * 20) for n in range(1, 51))
    found = read(text)
    assert (found.facts.count, found.facts.worst.eval_n, found.facts.worst.eval_ms) == (1, 50, 1000.25)
    assert read(text + text.replace("chatcmpl-1", "chatcmpl-2")).facts.count == 2


# ---- where it runs


def test_fixes_are_those_of_the_tool() -> None:
    line = "load_tensors: offloaded 0/25 layers to GPU\n"
    assert "-ngl 99" in shown(line)
    lm = shown(LM + line)
    assert "GPU Offload" in lm
    assert "-ngl" not in lm
    assert "-ngl" not in shown(OLLAMA.format(1, 1, "x.go:1", "x") + line)


def test_a_gpu_whose_memory_something_else_has_is_no_build_without_one() -> None:
    head = OLLAMA.format(1, 1, "types.go:131", '"inference compute" library=cuda total="12.0 GiB" available="10.8 GiB"')
    sizes = 'layers.model=41 layers.offload=0 memory.available="[3.5 GiB]" memory.required.full="6.2 GiB"'
    text = shown(
        head + OLLAMA.format(1, 9, "memory.go:356", f'"offload to cuda" {sizes}') + "vision using CPU backend\n"
    )
    assert "3.5 GiB free at the load; 6.2 GiB needed" in text
    assert "0 of 41" in text
    assert "2. encoder_on_cpu" in text
    assert "build" not in text


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("gemma3:27b   a418f5838eaf    22 GB    31%/69% CPU/GPU    8192   4 minutes from now", "partial_offload"),
        ('time=x level=INFO source=gpu.go:377 msg="no compatible GPUs were discovered"', "no_gpu"),
    ],
)
def test_what_ollama_says_of_its_place_is_a_cause(line: str, cause: str) -> None:
    assert names(line + "\n") == [cause]


def test_few_threads_are_told_where_the_cpu_works() -> None:
    threads = "0.04.864.689 I cmn init: llama threadpool init, n_threads = 4\nCPU(s):                20\n"
    found = read(threads)
    assert [cause.name for cause in found.causes] == ["threads"]
    assert found.verdict.startswith("Only 4 threads work on 20 processors")
    assert names(threads + "load_tensors: offloaded 33/33 layers to GPU\n") == []
    assert names("system info: n_threads = 6, n_threads_batch = 6, total_threads = 12\n") == []


def test_operations_that_fall_back_are_told_without_their_names() -> None:
    head = "warmup: WARNING: the CLIP graph uses unsupported operators by the backend\n"
    splits = "reserve_compute_meta: WebGPU compute buffer size = 231.44 MiB\n"
    splits += "reserve_compute_meta: graph splits = 197, nodes = 736\n"
    found = read(splits + "warmup: flash attention is enabled\n" + head)
    assert [cause.name for cause in found.causes] == ["unsupported_ops"]
    assert "WebGPU cannot compute some operations" in found.verdict
    assert "197 graph splits of 736 nodes" in found.verdict


@pytest.mark.parametrize(("swa", "flag"), [(1, False), (1024, True)])
def test_swa_full_is_only_for_sliding_windows(swa: int, flag: bool) -> None:
    slot = "slot update_slots: id  0 | task 135 | "
    head = f"{slot}new prompt, n_ctx_slot = 32768, n_keep = 0, task.n_tokens = 1371\n"
    head += f"{slot}n_past = 848, slot.prompt.tokens.size() = 1369, seq_id = 0, pos_min = 1368, n_swa = {swa}\n"
    head += f"{slot}forcing full prompt re-processing due to lack of cache data\n"
    one = TIMES.format(124, 5093.47, 1360, 319.58, 10) + head
    assert names(one) == ["no_prefix_reuse"]
    assert ("--swa-full" in shown(one)) == flag
    assert "which is not the one in the table, 848 of 1,371 tokens were cached" in shown(one)
    own = read(head + TIMES.format(135, 5093.47, 1371, 319.58, 10))
    assert own.causes[0].seconds == pytest.approx(5.093 * 848 / 1371, abs=0.01)
    small = read(head + TIMES.format(135, 58.87, 1371, 505.09, 43))
    assert small.verdict.startswith("Healthy")
    assert "processed again" in small.notes[-1]


def test_several_tools_in_one_file_are_told_apart() -> None:
    ollama = "total duration:       3.046s\nprompt eval count:    1119 token(s)\nprompt eval duration: 2.185s\n"
    ollama += "eval count: 9 token(s)\neval duration: 847ms\n"
    server = "$ llama-server -m x.gguf -ngl 30\nprompt eval time = 8734.21 ms / 971 tokens\n"
    server += "eval time = 1075.76 ms / 19 tokens\n"
    for text in (ollama + server, server + ollama):
        found = read(text)
        assert (found.facts.tool, found.facts.count) == ("llama-server", 2)
        assert [cause.name for cause in found.causes] == ["partial_offload"]
        assert any("requests of Ollama and of another tool" in note for note in found.notes)
    assert read(ollama).facts.tool == "Ollama"


# ---- words


def test_words_of_vision_are_there_only_with_an_image() -> None:
    times = TIMES.format(1, 30_000, 600, 5000, 60)
    assert "image" not in shown(times) + str(read(times).stages)
    seen = f"srv process_chun: processing image...\n{times}"
    assert "prompt (and images)" in [row.name for row in read(seen).stages]
    assert "image tokens" in shown(seen)


def test_the_headline_is_not_repeated() -> None:
    text = shown(TIMES.format(1, 26636.81, 612, 5028.35, 26))
    assert text.count("The prompt of 612 tokens") == 1
    assert text.count("Decode is slow") == 1
