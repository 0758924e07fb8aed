"""What ends the process in llama.cpp raises here.

For each of these calls there are two tests: ours raises, and the raw call still aborts in a child process. When one of
the second kind fails after an update, the check it belongs to may go.
"""

import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from token_rows import TokenRow, batch

from opsin.core.errors import BadParameter, DecodeFailed
from opsin.core.request import EmbeddingRows, TokenBatch

RAW = {
    "more tokens than a batch holds": """
from opsin.native.context import BatchArrays
b = opened()
c = b
arrays = BatchArrays(b.model.lib.llama.llama_batch, 200, 1)
b.model.lib.llama.llama_decode(c.handle.pointer, arrays.tokens(batch([TokenRow(5, i, 0) for i in range(200)])))
""",
    "an image that attends both ways and is larger than a ubatch": """
from opsin.native.context import BatchArrays
b = opened(mmproj=None)
llama, model = b.model.lib.llama, b.model
p = llama.llama_context_default_params()
p.n_ctx, p.n_batch, p.n_ubatch = 512, 256, 64
ctx = llama.llama_init_from_model(model.pointer, p)
llama.llama_set_causal_attn(ctx, False)
rows = EmbeddingRows(np.zeros((128, model.n_embd), np.float32), np.arange(128, dtype=np.int32)[None], 0)
llama.llama_decode(ctx, BatchArrays(llama.llama_batch, 128, 1).embeddings(rows, rows.rows))
""",
    "a part of a sequence copied while the memory is in streams": """
b = opened(mmproj=None)
llama = b.model.lib.llama
from opsin.native.context import BatchArrays
p = llama.llama_context_default_params()
p.n_ctx, p.n_seq_max, p.kv_unified = 512, 4, False
ctx = llama.llama_init_from_model(b.model.pointer, p)
llama.llama_decode(ctx, BatchArrays(llama.llama_batch, 64, 1).tokens(batch([TokenRow(5, i, 0) for i in range(20)])))
llama.llama_memory_seq_cp(llama.llama_get_memory(ctx), 0, 1, 3, 10)
""",
    "a sequence that does not exist": """
b = opened()
b.model.lib.llama.llama_memory_seq_rm(b._memory, 4000, 0, -1)
""",
    "more logits than were reserved": """
b = opened(parallel=1, ubatch=256)
c = b
b.model.lib.llama.llama_decode(c.handle.pointer, c._arrays.tokens(batch([TokenRow(5, i, 0, True) for i in range(100)])))
""",
    "more sequences than a ubatch has rows": """
b = opened(mmproj=None)
llama = b.model.lib.llama
p = llama.llama_context_default_params()
p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = 512, 16, 16, 64
llama.llama_init_from_model(b.model.pointer, p)
""",
    "a load without memory while the file is mapped": """
from opsin.native.library import library
llama = library().llama
p = llama.llama_model_default_params()
p.no_alloc = True
llama.llama_model_load_from_file(str(LLM).encode(), p)
""",
}


@pytest.mark.parametrize("what", RAW)
def test_the_raw_call_still_aborts(what: str, in_child: Callable[[str], Any]) -> None:
    child = in_child(RAW[what] + "\nprint('survived')")
    assert "survived" not in child.out
    assert child.code in {-signal.SIGABRT, -signal.SIGSEGV}, (child.code, child.err[-400:])


def rows(count: int, start: int = 0, seq_id: int = 0) -> TokenBatch:
    return batch([TokenRow(5, start + index, seq_id) for index in range(count)])


def image_rows(backend: Any, count: int, start: int = 0, **fields: Any) -> EmbeddingRows:
    data = np.zeros((count, backend.limits.n_embd), np.float32)
    return EmbeddingRows(data, np.arange(start, start + count, dtype=np.int32)[np.newaxis, :], 0, **fields)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda b: rows(b.limits.n_ubatch + 1), "does not fit the ubatch of 64"),
        (lambda _: batch([]), "does not fit the ubatch of 64"),
        (lambda b: rows(1, seq_id=b.limits.n_seq_max), "no sequence"),
        (lambda _: rows(1, seq_id=-1), "no sequence"),
        (lambda b: batch([TokenRow(b.limits.n_vocab, 0, 0)]), "returned -1"),
        (lambda _: batch([TokenRow(-1, 0, 0)]), "returned -1"),
        (lambda _: batch([TokenRow(5, 0, 0), TokenRow(5, 2, 0)]), "returned -1"),
        (lambda b: image_rows(b, b.limits.n_ubatch + 1, causal=False), "reads an image whole"),
        (lambda b: image_rows(b, 4, start=2), "do not follow"),
        (lambda _: EmbeddingRows(np.zeros((2, 7), np.float32), np.zeros((1, 2), np.int32), 0), "must be"),
        (lambda b: EmbeddingRows(np.zeros((2, b.limits.n_embd)), np.zeros((1, 2), np.int32), 0), "float32"),
        (
            lambda b: EmbeddingRows(np.zeros((2, b.limits.n_embd), np.float32), np.zeros((4, 2), np.int32), 0),
            "Positions must be",
        ),
        (
            lambda b: EmbeddingRows(np.zeros((2, b.limits.n_embd), np.float32), np.full((1, 2), -1, np.int32), 0),
            "do not follow",
        ),
        (
            lambda b: EmbeddingRows(np.zeros((2, b.limits.n_embd), np.float32), np.zeros((1, 2), np.int32), 0),
            "do not follow",
        ),
    ],
)
def test_a_batch_that_would_abort_raises_and_changes_nothing(backend: Any, wrong: Any, says: str) -> None:
    with pytest.raises(DecodeFailed, match=says):
        backend.decode(wrong(backend))
    assert backend.kv_last(0) == -1
    assert backend.decode(rows(2))


def test_too_many_rows_with_logits_are_refused(open_pair: Callable[..., Any]) -> None:
    backend = open_pair(parallel=1, ubatch=256)
    try:
        with pytest.raises(DecodeFailed, match="want logits"):
            backend.decode(batch([TokenRow(5, index, 0, True) for index in range(100)]))
    finally:
        backend.close()


def test_more_answers_than_a_ubatch_holds_are_refused(open_pair: Callable[..., Any]) -> None:
    with pytest.raises(BadParameter, match=r"64 answers at a time do not fit a ubatch of 32"):
        open_pair(parallel=64, ubatch=32)


def test_sequences_that_do_not_exist_are_refused_everywhere(backend: Any) -> None:
    beyond = backend.limits.n_seq_max
    for call in (
        lambda: backend.kv_last(beyond),
        lambda: backend.kv_remove(beyond, 0, -1),
        lambda: backend.kv_copy(0, beyond, 0, -1),
        lambda: backend.kv_copy(-1, 0, 0, -1),
    ):
        with pytest.raises(DecodeFailed, match="no sequence"):
            call()


def test_a_part_of_a_sequence_is_copied_in_our_layout(backend: Any) -> None:
    assert backend.decode(rows(20))
    backend.kv_copy(0, 1, 0, 10)
    assert backend.kv_last(1) == 9
    assert backend.decode(rows(3, start=10, seq_id=1))


def test_a_full_memory_is_told_and_leaves_everything_as_it_was(backend: Any) -> None:
    filled = 0
    while backend.decode(rows(64, start=filled)):
        filled += 64
    assert filled == backend.limits.n_ctx
    assert backend.kv_last(0) == filled - 1
    assert backend.kv_remove(0, filled - 64, -1)
    assert backend.decode(rows(64, start=filled - 64))


def test_a_row_without_logits_cannot_be_sampled(backend: Any) -> None:
    from opsin.core.request import SamplingParams

    assert backend.decode(batch([TokenRow(5, 0, 0), TokenRow(6, 1, 0, True), TokenRow(7, 2, 0)]))
    sampler = backend.sampler(SamplingParams(temperature=0), 1)
    with pytest.raises(DecodeFailed, match=r"Row 0 .* no logits"):
        sampler.sample(0)
    assert sampler.sample(1) == sampler.sample(-1)
    sampler.close()


def test_an_f32_projector_encodes(in_child: Callable[[str], Any]) -> None:
    """An all-f32 projector crashed the CPU backend of an earlier llama.cpp; this one widens and must go on to."""
    child = in_child("""
import tempfile
from synth import write_pair
wide = write_pair("tiny", Path(tempfile.mkdtemp()), mmproj_type="f32")
a, b = opened(), opened(model=wide.llm, mmproj=wide.mmproj)
x, y = (m.encode(m.tokenize([ImagePart(draw())], add_bos=False).chunks[-1]) for m in (a, b))
print(float(np.abs(x - y).max() / np.abs(x).max()))
""")
    assert child.code == 0, child.err[-400:]
    assert float(child.out) < 0.02


def test_a_process_that_ends_at_once_waits_for_the_tokenizer(in_child: Callable[[str], Any]) -> None:
    """A thread that is still inside llguidance when Python ends takes the process down."""
    child = in_child("""
import time
from opsin.native.constraint import Constraints
build = Constraints._build_tokenizer
def late(self):
    time.sleep(0.3)
    build(self)
    print("built")
Constraints._build_tokenizer = late
backend = opened(mmproj=None)
""")
    assert (child.code, child.out.strip()) == (0, "built"), child.err[-400:]
