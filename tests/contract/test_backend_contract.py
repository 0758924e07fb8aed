"""What core.backend promises, asked of the fake and of real llama.cpp alike."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_rows import TokenRow, batch

from opsin.core.backend import BackendLimits, Stopped
from opsin.core.errors import BadGrammar
from opsin.core.request import EmbeddingRows, ImageChunk, ImagePart, SamplingParams, TextChunk, TextPart, TokenBatch
from opsin.core.settings import EngineSettings
from opsin.testing import FakeBackend, image


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from synth import write_pair

    return write_pair("tiny", Path(tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module", params=["fake", "native", "parts", "sampled"])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "fake":
        limits = BackendLimits(
            n_ctx=512, n_ubatch=64, n_seq_max=4, n_vocab=259, n_embd=4, n_ctx_seq=512, mixed_rows=64, stops=True
        )
        made: Any = FakeBackend(lambda text: f"{len(text)} things", limits=limits)
    else:
        from opsin.native import open_backend

        pair = request.getfixturevalue("tiny")
        kind = {"ctx": 4 * 512, "kv_unified": False} if request.param == "parts" else {"ctx": 512}
        kind["device_sampling"] = request.param == "sampled"
        made = open_backend(EngineSettings(model=pair.llm, mmproj=pair.mmproj, parallel=4, ubatch=64, **kind))
    yield made
    made.close()
    made.close()


def fill(backend: Any, seq_id: int, text: str, shot: int | None = None, chunk: int = 64) -> int:
    """Prefill a prompt; the row of the last logits."""
    backend.kv_remove(seq_id, 0, -1)
    parts = ([ImagePart(image(shot, 40, 30))] if shot is not None else []) + [TextPart(text + "\x1e")]
    tokenized = backend.tokenize(parts, add_bos=True)
    pos, row = 0, 0
    for run in tokenized.chunks:
        for start in range(0, run.n_tokens, chunk):
            stop = min(run.n_tokens, start + chunk)
            last = run is tokenized.chunks[-1] and stop == run.n_tokens
            if isinstance(run, ImageChunk):
                embedding = backend.encode(run)
                positions = np.arange(pos + start, pos + stop, dtype=np.int32)[np.newaxis, :]
                assert backend.decode(EmbeddingRows(embedding[start:stop], positions, seq_id, logits=last))
            else:
                rows = [
                    TokenRow(token, pos + start + i, seq_id, logits=last and start + i == run.n_tokens - 1)
                    for i, token in enumerate(run.tokens[start:stop])
                ]
                assert backend.decode(batch(rows))
            row = stop - start - 1
        pos += run.n_pos
    backend.synchronize()
    tokenized.close()
    tokenized.close()
    assert backend.kv_last(seq_id) == pos - 1
    return row


def greedy(backend: Any, seq_id: int, row: int, count: int = 6) -> list[int]:
    sampler = backend.sampler(SamplingParams(temperature=0.0), 1)
    try:
        tokens = []
        for _ in range(count):
            tokens.append(sampler.sample(row))
            assert backend.decode(batch([TokenRow(tokens[-1], backend.kv_last(seq_id) + 1, seq_id, logits=True)]))
            row = 0
        return tokens
    finally:
        sampler.close()


def test_layout_keeps_the_order_of_text_and_images(backend: Any) -> None:
    parts = [TextPart("one"), ImagePart(image(1)), TextPart("two"), ImagePart(image(2)), TextPart("three")]
    tokenized = backend.tokenize(parts, add_bos=True)
    kinds = [type(run) for run in tokenized.chunks if run.n_tokens]
    assert kinds == [TextChunk, ImageChunk, TextChunk, ImageChunk, TextChunk]
    assert [run.image for run in tokenized.chunks if isinstance(run, ImageChunk)] == [0, 1]
    assert [info.sha256 for info in tokenized.images] == [image(1).sha256, image(2).sha256]
    assert tokenized.n_image_tokens == sum(info.tokens for info in tokenized.images) > 0
    tokenized.close()


def test_equal_images_have_equal_identities_and_embeddings(backend: Any) -> None:
    prompts = [backend.tokenize([ImagePart(image(seed, 40, 30))], add_bos=False) for seed in (1, 1, 2)]
    runs = [next(run for run in tokenized.chunks if isinstance(run, ImageChunk)) for tokenized in prompts]
    assert runs[0].identity == runs[1].identity != runs[2].identity
    rows = [backend.encode(run) for run in runs]
    assert rows[0].shape == (runs[0].n_tokens, backend.limits.n_embd)
    assert rows[0].dtype == np.float32
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.allclose(rows[0], rows[2])
    for tokenized in prompts:
        tokenized.close()


def test_the_same_prompt_gives_the_same_answer_and_another_image_another(backend: Any) -> None:
    first, again = (greedy(backend, 0, fill(backend, 0, "what is this?", 1)) for _ in range(2))
    assert first == again


def test_a_prompt_may_be_filled_and_answered_between_two_layers_of_an_encode(backend: Any) -> None:
    tokenized = backend.tokenize([ImagePart(image(5, 40, 30))], add_bos=False)
    run = next(run for run in tokenized.chunks if isinstance(run, ImageChunk))
    alone, wanted = backend.encode(run, lambda: None), greedy(backend, 0, fill(backend, 0, "what is this?"))
    found: list[list[int]] = []

    def beside() -> None:
        if not found:
            found.append(greedy(backend, 1, fill(backend, 1, "what is this?")))
            saved = backend.kv_save(1)
            assert backend.kv_remove(1, 0, -1)
            backend.kv_load(1, saved)

    np.testing.assert_array_equal(backend.encode(run, beside), alone)
    assert found == [wanted]
    assert backend.kv_last(1) == backend.kv_last(0)
    tokenized.close()


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
    assert backend.decode(batch([TokenRow(token, length, 2, logits=True)]))
    backend.kv_remove(0, 0, -1)
    assert backend.kv_last(0) == -1
    assert backend.kv_last(2) == length
    backend.kv_remove(2, 0, -1)


def test_a_sequence_that_was_swapped_out_goes_on_as_if_nothing_had_happened(backend: Any) -> None:
    row = fill(backend, 0, "a question", 3)
    length = backend.kv_last(0) + 1
    backend.kv_remove(2, 0, -1)
    backend.kv_copy(0, 2, 0, length)  # shared cells belong to both
    saved = backend.kv_save(2)
    backend.kv_remove(2, 0, -1)
    expected = greedy(backend, 0, row)
    backend.kv_remove(0, 0, -1)
    fill(backend, 1, "another one", 1)
    backend.kv_load(0, saved)
    assert backend.kv_last(0) == length - 1
    assert backend.decode(batch([TokenRow(expected[0], length, 0, logits=True)]))
    assert greedy(backend, 0, 0, 5) == expected[1:]
    backend.kv_remove(1, 0, -1)
    backend.kv_remove(0, 0, -1)


def test_tokens_beside_an_images_rows_are_computed_as_those_alone(backend: Any) -> None:
    def likely(row: int) -> dict[int, float]:
        return {token: logprob for token, _, logprob in backend.logprobs(row, 65, 5).top}

    def image_rows(embedding: Any, beside: TokenBatch) -> EmbeddingRows:
        positions = np.arange(len(embedding), dtype=np.int32)[np.newaxis, :]
        return EmbeddingRows(embedding, positions, 2, logits=True, beside=beside)

    assert backend.limits.mixed_rows
    texts = {0: "what is this?", 1: "and that?"}
    for seq_id, text in texts.items():
        fill(backend, seq_id, text)
    ends = {seq_id: backend.kv_last(seq_id) + 1 for seq_id in texts}
    tokens = batch([TokenRow(65, ends[0], 0, logits=True), TokenRow(66, ends[1], 1, logits=True)])
    tokenized = backend.tokenize([ImagePart(image(3, 40, 30))], add_bos=False)
    (run,) = (run for run in tokenized.chunks if isinstance(run, ImageChunk))
    embedding = backend.encode(run)

    backend.kv_remove(2, 0, -1)
    assert backend.decode(image_rows(embedding, TokenBatch()))
    alone = [likely(len(embedding) - 1)]
    backend.kv_remove(2, 0, -1)
    assert backend.decode(tokens)
    alone += [likely(0), likely(1)]
    for seq_id, end in ends.items():
        backend.kv_remove(seq_id, end, -1)

    assert backend.decode(image_rows(embedding, tokens))
    together = [likely(len(embedding) + 1), likely(0), likely(1)]
    assert {seq_id: backend.kv_last(seq_id) for seq_id in ends} == ends
    for one, other in zip(alone, together, strict=True):
        assert next(iter(one)) == next(iter(other))
        assert one == pytest.approx(other, abs=0.05)
    for seq_id in (*texts, 2):
        backend.kv_remove(seq_id, 0, -1)
    tokenized.close()


def test_text_behind_an_images_rows_is_computed_as_text_alone(backend: Any) -> None:
    tokenized = backend.tokenize([ImagePart(image(3, 40, 30))], add_bos=False)
    (run,) = (run for run in tokenized.chunks if isinstance(run, ImageChunk))
    embedding, text = backend.encode(run), tuple(b"what?")
    at = len(embedding)
    positions = np.arange(at, dtype=np.int32)[np.newaxis, :]
    found = []
    for together in (False, True):
        backend.kv_remove(2, 0, -1)
        if together:
            rows = EmbeddingRows(embedding, positions, 2, logits=True, behind=text, behind_at=at)
            assert backend.decode(rows)
            row = at + len(text) - 1
        else:
            assert backend.decode(EmbeddingRows(embedding, positions, 2))
            last = len(text) - 1
            assert backend.decode(batch([TokenRow(t, at + i, 2, logits=i == last) for i, t in enumerate(text)]))
            row = last
        assert backend.kv_last(2) == at + len(text) - 1
        found.append({token: logprob for token, _, logprob in backend.logprobs(row, 65, 5).top})
    assert found[0] == pytest.approx(found[1], abs=0.05)
    backend.kv_remove(2, 0, -1)
    tokenized.close()


def test_no_room_is_false_and_changes_nothing(backend: Any) -> None:
    for seq_id in range(4):
        backend.kv_remove(seq_id, 0, -1)
    pos = 0
    while backend.decode(batch([TokenRow(65, pos + i, 0) for i in range(64)])):
        pos += 64
        assert pos <= backend.limits.n_ctx
    assert backend.kv_last(0) == pos - 1
    backend.kv_remove(0, 0, -1)
    assert backend.decode(batch([TokenRow(65, 0, 0, logits=True)]))


def test_a_decode_that_may_stop_ends_when_told_and_leaves_no_trace(backend: Any) -> None:
    row = fill(backend, 0, "What is this?")
    wanted = greedy(backend, 0, row)
    row = fill(backend, 0, "What is this?")
    held, more = backend.kv_last(0), TokenBatch()
    more.append((65,) * 40, held + 1, 0, logits=True)
    backend.stop(True)
    if backend.limits.stops:
        with pytest.raises(Stopped):
            backend.decode(more, may_stop=True)
        assert backend.kv_last(0) == held
        row = fill(backend, 0, "What is this?")  # no other decode stops
        assert greedy(backend, 0, row) == wanted
    backend.stop(False)
    fill(backend, 0, "What is this?")
    assert backend.decode(more, may_stop=True)
    backend.kv_remove(0, 0, -1)


def test_a_bad_grammar_is_refused(backend: Any) -> None:
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
    """A ring of pointers waits for the garbage collector, with whatever it holds; one an image adds up."""
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


def test_rows_of_a_batch_are_sampled_at_once_as_they_are_one_by_one(backend: Any) -> None:
    questions = ("what is this?", "how many?", "where?")
    alone = [greedy(backend, seq_id, fill(backend, seq_id, text)) for seq_id, text in enumerate(questions)]
    samplers = [backend.sampler(SamplingParams(temperature=0.0), 1) for _ in questions]
    told: list[list[int]] = []
    for seq_id, (text, sampler) in enumerate(zip(questions, samplers, strict=True)):
        ((token, logprob),) = backend.sample([(sampler, fill(backend, seq_id, text), 2)])
        assert logprob.token == token == logprob.top[0][0]
        told.append([token])
    for _ in range(3):
        rows = [TokenRow(said[-1], backend.kv_last(i) + 1, i, logits=True) for i, said in enumerate(told)]
        assert backend.decode(batch(rows))
        for said, result in zip(told, backend.sample([(s, i, None) for i, s in enumerate(samplers)]), strict=True):
            said.append(result[0])
    assert told == [tokens[:4] for tokens in alone]
    for seq_id, sampler in enumerate(samplers):
        sampler.close()
        backend.kv_remove(seq_id, 0, -1)


def test_the_end_of_a_sequence_can_be_forgotten_and_another_put_there(backend: Any) -> None:
    """As a draft is verified: rows of one sequence that all have logits, of which the last are cut off."""
    tokens = greedy(backend, 0, fill(backend, 0, "what is this?", shot=3), count=4)
    row = fill(backend, 1, "what is this?", shot=3)
    sampler = backend.sampler(SamplingParams(temperature=0.0), 1)
    first = backend.kv_last(1) + 1
    assert sampler.sample(row) == tokens[0]
    wrong = next(token for token in range(5, 9) if token != tokens[2])
    draft = [TokenRow(token, first + i, 1, logits=True) for i, token in enumerate([*tokens[:2], wrong, wrong])]
    assert backend.decode(batch(draft))
    assert [sampler.sample(row) for row in range(2)] == tokens[1:3]
    assert backend.kv_remove(1, first + 2, -1)
    assert backend.kv_last(1) == first + 1
    assert backend.decode(batch([TokenRow(tokens[2], first + 2, 1, logits=True)]))
    assert sampler.sample(0) == tokens[3]
    sampler.close()
    backend.kv_remove(0, 0, -1)
    backend.kv_remove(1, 0, -1)
