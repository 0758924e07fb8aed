"""What core.backend promises, asked of the fake and of real llama.cpp alike."""

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opsin.core.backend import BackendLimits, EmbeddingRows, TokenRow
from opsin.core.errors import BadGrammar, DecodeFailed
from opsin.core.layout import ImageRun, TextRun
from opsin.core.parts import PicturePart, TextPart
from opsin.core.sampling import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.testing import FakeBackend, picture


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from synth import write_pair

    return write_pair("tiny", Path(tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module", params=["fake", "native", "fake of its own", "native of its own"])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    shared = "own" not in request.param
    if request.param.startswith("fake"):
        limits = BackendLimits(n_ctx=512, n_batch=64, n_ubatch=64, n_seq_max=4, n_vocab=259, n_embd=4, shared=shared)
        if not shared:
            limits = dataclasses.replace(limits, n_ctx=1024, common=160)
        made: Any = FakeBackend(lambda text: f"{len(text)} things", limits=limits)
    else:
        from opsin.native import open_backend

        pair = request.getfixturevalue("tiny")
        ctx = 512 if shared else 4096
        made = open_backend(EngineSettings(model=pair.llm, mmproj=pair.mmproj, ctx=ctx, parallel=4, ubatch=64))
    assert made.limits.shared is shared
    yield made
    made.close()
    made.close()


def fill(backend: Any, seq_id: int, text: str, shot: int | None = None, chunk: int = 64) -> int:
    """Prefill a prompt; the row of the last logits."""
    backend.kv_remove(seq_id, 0, -1)
    parts = ([PicturePart(picture(shot, 40, 30))] if shot is not None else []) + [TextPart(text + "\x1e")]
    layout = backend.layout(parts, add_bos=True)
    pos, row = 0, 0
    for run in layout.runs:
        for start in range(0, run.n_tokens, chunk):
            stop = min(run.n_tokens, start + chunk)
            last = run is layout.runs[-1] and stop == run.n_tokens
            if isinstance(run, ImageRun):
                embedding = backend.encode(run)
                positions = np.arange(pos + start, pos + stop, dtype=np.int32)[np.newaxis, :]
                assert backend.decode(EmbeddingRows(embedding[start:stop], positions, seq_id, logits=last))
            else:
                rows = [
                    TokenRow(token, pos + start + i, seq_id, logits=last and start + i == run.n_tokens - 1)
                    for i, token in enumerate(run.tokens[start:stop])
                ]
                assert backend.decode(rows)
            row = stop - start - 1
        pos += run.n_pos
    backend.synchronize()
    layout.close()
    layout.close()
    assert backend.kv_last(seq_id) == pos - 1
    return row


def greedy(backend: Any, seq_id: int, row: int, count: int = 6) -> list[int]:
    sampler = backend.sampler(SamplingParams(temperature=0.0), 1)
    try:
        tokens = []
        for _ in range(count):
            tokens.append(sampler.sample(row))
            assert backend.decode([TokenRow(tokens[-1], backend.kv_last(seq_id) + 1, seq_id, logits=True)])
            row = 0
        return tokens
    finally:
        sampler.close()


def test_layout_keeps_the_order_of_text_and_pictures(backend: Any) -> None:
    parts = [TextPart("one"), PicturePart(picture(1)), TextPart("two"), PicturePart(picture(2)), TextPart("three")]
    layout = backend.layout(parts, add_bos=True)
    kinds = [type(run) for run in layout.runs if run.n_tokens]
    assert kinds == [TextRun, ImageRun, TextRun, ImageRun, TextRun]
    assert [run.picture for run in layout.runs if isinstance(run, ImageRun)] == [0, 1]
    assert [image.sha256 for image in layout.images] == [picture(1).sha256, picture(2).sha256]
    assert layout.n_image_tokens == sum(image.tokens for image in layout.images) > 0
    layout.close()


def test_equal_pictures_have_equal_identities_and_embeddings(backend: Any) -> None:
    layouts = [backend.layout([PicturePart(picture(seed, 40, 30))], add_bos=False) for seed in (1, 1, 2)]
    runs = [next(run for run in layout.runs if isinstance(run, ImageRun)) for layout in layouts]
    assert runs[0].identity == runs[1].identity != runs[2].identity
    rows = [backend.encode(run) for run in runs]
    assert rows[0].shape == (runs[0].n_tokens, backend.limits.n_embd)
    assert rows[0].dtype == np.float32
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.allclose(rows[0], rows[2])
    for layout in layouts:
        layout.close()


def test_the_same_prompt_gives_the_same_answer_and_another_picture_another(backend: Any) -> None:
    first, again = (greedy(backend, 0, fill(backend, 0, "what is this?", 1)) for _ in range(2))
    assert first == again


def test_a_prompt_in_slices_gives_the_same_answer(backend: Any) -> None:
    whole = greedy(backend, 0, fill(backend, 0, "what is this?", 1))
    sliced = greedy(backend, 1, fill(backend, 1, "what is this?", 1, chunk=5))
    assert whole == sliced


def test_a_fork_shares_what_was_filled(backend: Any) -> None:
    row = fill(backend, 0, "a question", 3)
    length = backend.kv_last(0) + 1
    backend.kv_remove(2, 0, -1)
    backend.kv_copy(0, 2, 0, length)
    assert backend.kv_last(2) == length - 1
    token = greedy(backend, 0, row, 1)[0]
    assert backend.decode([TokenRow(token, length, 2, logits=True)])
    backend.kv_remove(0, 0, -1)
    assert backend.kv_last(0) == -1
    assert backend.kv_last(2) == length
    backend.kv_remove(2, 0, -1)


def test_no_room_is_false_and_changes_nothing(backend: Any) -> None:
    for seq_id in range(4):
        backend.kv_remove(seq_id, 0, -1)
    pos = 0
    while backend.decode([TokenRow(65, pos + i, 0) for i in range(64)]):
        pos += 64
        assert pos <= backend.limits.n_ctx
    assert backend.kv_last(0) == pos - 1
    backend.kv_remove(0, 0, -1)
    assert backend.decode([TokenRow(65, 0, 0, logits=True)])


def test_a_bad_grammar_is_refused(backend: Any) -> None:
    with pytest.raises(BadGrammar):
        backend.sampler(SamplingParams(grammar="bad"), 1).close()
    with pytest.raises(BadGrammar):
        backend.check(SamplingParams(grammar="bad"))
    backend.check(SamplingParams())


def test_logprobs_are_of_the_drawn_token_and_sorted(backend: Any) -> None:
    row = fill(backend, 0, "hello")
    entry = backend.logprobs(row, 65, 5)
    assert entry.token == 65
    assert entry.logprob <= 0.0
    values = [value for _, _, value in entry.top]
    assert values == sorted(values, reverse=True)
    assert values[0] >= entry.logprob


def test_placement_says_where_both_ran(backend: Any) -> None:
    placement = backend.placement()
    for shares in (placement.encoder, placement.language_model):
        assert sum(share.nodes for share in shares.values()) > 0
        assert sum(share.share_of_ops for share in shares.values()) == pytest.approx(1.0)


def test_computing_leaves_no_rings_behind(backend: Any) -> None:
    """A ring of pointers waits for the garbage collector, with whatever it holds; one a picture adds up."""
    fill(backend, 0, "warm", shot=1)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            fill(backend, 0, "warm", shot=1)
        gc.collect()
        # ctypes' types of arrays are rings by nature, one a size.
        left = {type(thing).__name__ for thing in gc.garbage if not isinstance(thing, type)}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not {name for name in left if name.startswith(("LP_", "c_", "ndarray"))}, left


def test_members_of_the_common_memory_answer_as_they_did_at_their_own_places(backend: Any) -> None:
    if not backend.limits.common:
        pytest.skip("one memory for all")
    questions = enumerate(("what is this?", "how many?"))
    alone = [greedy(backend, seq_id, fill(backend, seq_id, text, 3)) for seq_id, text in questions]
    fill(backend, 0, "what is this?", 3)
    backend.kv_join(0)
    last = backend.kv_last(0)
    backend.kv_copy(0, 2, 0, last)  # a fork without the last token, which is decoded again
    tokens = [token for run in _tokens_of(backend, "what is this?", 3) for token in run]
    assert backend.kv_last(2) == last - 1
    # One batch for a member, a fork of it and somebody at a place of its own.
    backend.kv_remove(0, last, -1)
    fill(backend, 1, "how many?", 3)
    backend.kv_remove(1, backend.kv_last(1), -1)
    again = _tokens_of(backend, "how many?", 3)[-1][-1]
    batch = [
        TokenRow(tokens[-1], last, 0, logits=True),
        TokenRow(again, backend.kv_last(1) + 1, 1, logits=True),
        TokenRow(tokens[-1], last, 2, logits=True),
    ]
    samplers = [backend.sampler(SamplingParams(temperature=0.0), 1) for _ in batch]
    told: list[list[int]] = [[], [], []]
    for _ in range(4):
        assert backend.decode(batch)
        backend.synchronize()
        for row, sampler in enumerate(samplers):
            told[row].append(sampler.sample(row))
        batch = [
            TokenRow(told[i][-1], backend.kv_last(row.seq_id) + 1, row.seq_id, logits=True)
            for i, row in enumerate(batch)
        ]
    for sampler in samplers:
        sampler.close()
    assert told == [alone[0][:4], alone[1][:4], alone[0][:4]]
    backend.kv_leave(2)
    assert backend.decode([TokenRow(told[2][-1], backend.kv_last(2) + 1, 2, logits=True)])
    backend.kv_remove(0, 0, -1)  # who forgets everything is no member any more
    row = fill(backend, 0, "what is this?", 3)
    assert greedy(backend, 0, row)[:4] == alone[0][:4]
    for seq_id in range(3):
        backend.kv_remove(seq_id, 0, -1)


def test_a_sequence_that_does_not_fit_the_common_memory_stays_where_it_is(backend: Any) -> None:
    if not backend.limits.common:
        pytest.skip("one memory for all")
    fill(backend, 0, "x" * 40)
    backend.kv_join(0)
    left = 30
    pos, stop = backend.kv_last(0) + 1, backend.limits.common - left
    while pos < stop:
        count = min(stop - pos, backend.limits.n_ubatch)
        assert backend.decode([TokenRow(65, pos + i, 0) for i in range(count)])
        pos += count
    fill(backend, 1, "y" * 40)
    assert left < backend.kv_last(1) + 1
    before = backend.kv_last(1)
    with pytest.raises(DecodeFailed):
        backend.kv_join(1)
    assert backend.kv_last(1) == before
    assert backend.decode([TokenRow(65, pos + i, 0) for i in range(left)])
    assert not backend.decode([TokenRow(65, pos + left, 0)]), "the common memory is full"
    assert backend.decode([TokenRow(65, before + 1, 1, logits=True)]), "and a place of its own is not"
    for seq_id in range(2):
        backend.kv_remove(seq_id, 0, -1)


def _tokens_of(backend: Any, text: str, shot: int) -> list[tuple[int, ...]]:
    layout = backend.layout([PicturePart(picture(shot, 40, 30)), TextPart(text + "\x1e")], add_bos=True)
    layout.close()
    return [run.tokens for run in layout.runs if isinstance(run, TextRun)]
