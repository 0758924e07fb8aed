"""The whole backend: lifetime, threads, defaults, and memory that stays flat."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from native_help import draw, generate, held, prefill
from token_rows import TokenRow, batch

from opsin.core.errors import EngineClosed, ModelNotFound, ModelUnreadable
from opsin.core.request import EmbeddingRows, ImageChunk, ImagePart, SamplingParams, TextPart
from opsin.core.settings import EngineSettings
from opsin.native import open_backend
from opsin.native.devices import Device, devices
from opsin.native.model import _placement


def test_closing_frees_children_first_and_only_once(open_pair: Callable[..., Any]) -> None:
    backend = open_pair(ctx=256)
    freed: list[str] = []
    sampler = held(backend, SamplingParams(grammar='root ::= "a"'), 1)

    def watch(handle: Any) -> None:
        free = handle._free
        handle._free = lambda pointer: (freed.append(handle.name), free(pointer))
        for child in handle._children.values():
            watch(child)

    watch(backend.model)
    backend.close()
    backend.close()
    sampler.close()
    assert freed == ["sampler", "context", "vision encoder", "language model"]


def test_a_closed_backend_raises_instead_of_touching_freed_memory(open_pair: Callable[..., Any]) -> None:
    backend = open_pair(ctx=256)
    tokenized = backend.tokenize([ImagePart(draw())], add_bos=True)
    sampler = backend.sampler(SamplingParams(), 1)
    backend.close()
    for call in (
        lambda: backend.decode(batch([TokenRow(5, 0, 0)])),
        lambda: backend.kv_last(0),
        lambda: backend.kv_remove(0, 0, -1),
        backend.synchronize,
        lambda: backend.encode(tokenized.chunks[-1]),
        lambda: backend.sampler(SamplingParams(), 1),
        lambda: backend.tokenize([ImagePart(draw())], add_bos=True),
        lambda: backend.tokenize([TextPart("hello")], add_bos=True),
        backend.placement,
        lambda: sampler.sample(-1),
    ):
        with pytest.raises(EngineClosed, match="closed already"):
            call()
    tokenized.close()


def test_a_failed_load_frees_what_it_had(open_pair: Callable[..., Any], pair: Any) -> None:
    process = psutil.Process()

    def fail() -> None:
        with pytest.raises(ModelUnreadable, match="cannot load the projector"):
            open_pair(mmproj=pair.llm)

    for _ in range(3):
        fail()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(20):
        fail()
    gc.collect()
    assert process.memory_info().rss - before < 4 * 2**20


def test_no_model_is_a_sentence() -> None:
    with pytest.raises(ModelNotFound, match="--model"):
        open_backend(EngineSettings())


def test_closing_waits_for_a_layout_that_is_being_made(open_pair: Callable[..., Any]) -> None:
    """A worker that tokenises while the model is freed reads freed memory."""
    backend = open_pair(ctx=256)
    inside, closed = threading.Event(), threading.Event()
    order: list[str] = []
    tokenize = backend.model.tokenize

    def slow(text: str, *, special: bool) -> Any:
        inside.set()
        assert not closed.wait(0.3)
        order.append("laid out")
        return tokenize(text, special=special)

    backend.model.tokenize = slow
    worker = threading.Thread(target=lambda: backend.tokenize([TextPart("hello")], add_bos=True))
    worker.start()
    assert inside.wait(20)
    backend.close()
    order.append("closed")
    closed.set()
    worker.join()
    assert order == ["laid out", "closed"]


def test_defaults_come_from_the_model(open_pair: Callable[..., Any]) -> None:
    backend = open_pair(ctx=None, parallel=1, ubatch=1024)
    assert backend.limits.n_ctx == 4096
    assert backend.limits.n_ubatch == 1024
    backend.close()
    backend = open_pair(ctx=None, parallel=3)
    assert (backend.limits.n_ctx, backend.limits.n_ctx_seq) == (3 * 4096, 4096)
    assert backend.limits.n_seq_max == 3 + 32, "idle prefixes have ids beside the three answers"
    backend.close()


CARD = Device("CUDA0", "a card", "gpu", 2**30, 2**30, 1)
INSIDE = Device("Vulkan0", "graphics inside the CPU", "igpu", 2**34, 2**34, 4)
AGAIN = Device("Vulkan1", "a card", "gpu", 2**30, 2**30, 5)
SECOND = Device("CUDA1", "a card", "gpu", 2**30, 2**30, 3)
CPU = Device("CPU", "a processor", "cpu", 2**34, 2**34, 2)


@pytest.mark.parametrize(
    ("settings", "present", "expected"),
    [
        ({}, (CPU,), ([], 0)),
        ({}, (CARD, CPU), (["CUDA0"], -1)),
        ({"gpu_layers": 1}, (CARD, CPU), (["CUDA0"], 1)),
        ({"gpu_layers": 7, "device": "none"}, (CARD, CPU), ([], 0)),
        ({"device": "cuda0"}, (CARD, SECOND, CPU), (["CUDA0"], -1)),
        ({"device": "cuda"}, (CARD, SECOND, CPU), (["CUDA0", "CUDA1"], -1)),
        ({}, (CARD, SECOND, CPU), (["CUDA0", "CUDA1"], -1)),
        ({}, (INSIDE, CARD, AGAIN, CPU), (["CUDA0"], -1)),
        ({"device": "vulkan"}, (INSIDE, CARD, AGAIN, CPU), (["Vulkan1"], -1)),
        ({}, (INSIDE, CPU), (["Vulkan0"], -1)),
    ],
)
def test_layers_go_to_the_gpu_unless_told_otherwise(settings: Any, present: Any, expected: Any) -> None:
    found, layers = _placement(EngineSettings(**settings), present)
    assert ([device.name for device in found], layers) == expected


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16"])
def test_types_of_the_memory_work(open_pair: Callable[..., Any], kv_type: str) -> None:
    backend = open_pair(kv_type=kv_type, mmproj=None)
    assert backend.decode(batch([TokenRow(5, 0, 0, True)]))
    assert backend.logprobs(-1, 5, 0).logprob < 0
    backend.close()


def test_a_memory_type_that_cannot_be_is_a_sentence(open_pair: Callable[..., Any]) -> None:
    """Heads of 16 values cannot hold a block of 32."""
    from opsin.core.errors import ModelError

    with pytest.raises(ModelError, match=r"q8_0.*(--ctx|--kv-type)"):
        open_pair(kv_type="q8_0")


def test_names_of_the_pair(backend: Any, pair: Any) -> None:
    info = backend.info
    assert (info.architecture, info.projector, info.quantisation) == ("llama", "mlp", "Q8_0")
    assert (info.llm_file, info.mmproj_file) == (pair.llm.name, pair.mmproj.name)
    assert (backend.model.bos, backend.model.eos) == ("<s>", "</s>")
    assert "</s>" in backend.model.control_tokens
    assert backend.model.metadata("llama.block_count") == "2"
    assert backend.model.metadata("no.such.key") == ""


def test_devices_are_named() -> None:
    found = devices()
    assert "CPU" in [device.name for device in found]
    assert all(device.description for device in found)


def test_an_image_may_attend_both_ways_and_the_text_behind_it_does_not(backend: Any) -> None:
    tokenized = backend.tokenize([ImagePart(draw())], add_bos=False)
    run = next(run for run in tokenized.chunks if isinstance(run, ImageChunk))
    rows = backend.encode(run)
    tokenized.close()
    positions = np.arange(run.n_tokens, dtype=np.int32)[np.newaxis, :]

    def after(seq_id: int, *, causal: bool) -> Any:
        assert backend.decode(EmbeddingRows(rows, positions, seq_id, causal=causal))
        assert backend.decode(batch([TokenRow(5, run.n_tokens, seq_id, True), TokenRow(6, run.n_tokens + 1, seq_id)]))
        return backend.logits(0).copy()

    both, forward = after(0, causal=False), after(1, causal=True)
    assert not np.allclose(both, forward)
    assert np.allclose(after(2, causal=True), forward, atol=1e-4)


def test_200_images_leave_memory_flat(open_pair: Callable[..., Any]) -> None:
    backend = open_pair()
    process = psutil.Process()

    def ask(seed: int) -> None:
        tokenized = backend.tokenize([TextPart("USER: "), ImagePart(draw(seed)), TextPart(" what?")], add_bos=True)
        pos = prefill(backend, tokenized)
        sampler = held(backend, SamplingParams(grammar="root ::= [a-z]+", temperature=1.0), seed)
        generate(backend, sampler, pos, 4)
        backend.logprobs(-1, 5, 5)
        sampler.close()
        tokenized.close()
        backend.kv_remove(0, 0, -1)

    for seed in range(20):
        ask(seed)
    gc.collect()
    before = process.memory_info().rss
    for seed in range(20, 200):
        ask(seed)
    gc.collect()
    grown = process.memory_info().rss - before
    backend.close()
    assert grown < 0.02 * before, f"{grown / 2**20:.1f} MiB"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_backend_at_rest_has_no_threads_that_wait_and_computes_the_same_afterwards(open_pair: Any) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    backend = open_pair(threads=2, threads_batch=2)
    backend.pause_threads()  # those of earlier tests
    before = threads()

    def logits() -> Any:
        backend.kv_remove(0, 0, -1)
        assert backend.decode(batch([TokenRow(token, token - 5, 0, logits=token == 24) for token in range(5, 25)]))
        return np.array(backend.logits(-1))

    first = logits()
    if threads() == before:
        pytest.skip("this build of ggml computes without OpenMP")
    backend.pause_threads()
    assert threads() <= before  # a thread of an earlier test may end meanwhile
    backend.pause_threads()
    assert np.array_equal(logits(), first)
    backend.close()


def test_it_is_told_how_much_of_a_model_is_loaded(pair: Any) -> None:
    told: list[float] = []
    open_backend(EngineSettings(model=pair.llm, ctx=512), told.append).close()
    assert told == sorted(set(told))
    assert told[-1] == 1.0
