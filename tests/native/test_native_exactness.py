"""What was computed before is what is computed again: forks, whole runs and slices, for every kind of image model.

"Exact" is equal in every bit, which needs the same batch shapes: a matrix product of another shape may add up in
another order, and that is what the tolerance is for.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_rows import TokenRow, batch

from opsin.core.errors import DecodeFailed
from opsin.core.request import Chunk, EmbeddingRows, Image, ImageChunk, ImagePart, TextPart, TokenizedPrompt
from opsin.core.settings import EngineSettings

KINDS = ("tiny", "llava-1.6-tiny", "qwen2vl-tiny", "gemma3-tiny")
TOLERANCE = 0.02
"""Logits between batch shapes, of f16 weights whose logits spread by 1 to 2. Seen: at most 0.005."""

QUESTION = " What is in this image, and what stands beside it on the left?"


@pytest.fixture(scope="module")
def open_kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    from opsin.native import open_backend
    from synth import write_pair

    pairs: dict[str, Any] = {}

    def opened(kind: str, **settings: Any) -> Any:
        if kind not in pairs:
            pairs[kind] = write_pair(kind, Path(tmp_path_factory.mktemp(kind)), quantisation="f16")
        pair = pairs[kind]
        most = 64 if kind == "qwen2vl-tiny" else None
        wanted = {"model": pair.llm, "mmproj": pair.mmproj, "ctx": 1024, "parallel": 4, "ubatch": 256, "threads": 1}
        return open_backend(EngineSettings(**{**wanted, "image_max_tokens": most, **settings}))

    return opened


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, open_kind: Callable[..., Any]) -> Iterator[Any]:
    backend = open_kind(request.param)
    yield backend
    backend.close()


@pytest.fixture
def backend(shared: Any) -> Any:
    for seq_id in range(shared.limits.n_seq_max):
        shared.kv_remove(seq_id, 0, -1)
    return shared


def shot(width: int = 240, height: int = 90, seed: int = 0) -> Image:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8).tobytes()
    return Image(rgb, width, height, hashlib.sha256(rgb).hexdigest(), "PNG")


def tokenize_prompt(backend: Any, question: str = QUESTION, image: Image | None = None) -> TokenizedPrompt:
    parts = [TextPart("USER: look at "), ImagePart(image or shot()), TextPart(question)]
    return backend.tokenize(parts, add_bos=True)


def fill(backend: Any, seq_id: int, runs: Sequence[Chunk], pos: int = 0, chunk: int = 256) -> int:
    """Decode whole runs, `chunk` rows at a time where that is allowed; the next position."""
    for run in runs:
        size = chunk if not isinstance(run, ImageChunk) or run.causal else run.n_tokens
        rows = backend.encode(run) if isinstance(run, ImageChunk) else None
        for start in range(0, run.n_tokens, size):
            stop = min(run.n_tokens, start + size)
            if isinstance(run, ImageChunk):
                positions = run.positions_at(pos, start, stop)
                assert backend.decode(EmbeddingRows(rows[start:stop], positions, seq_id, causal=run.causal))
            else:
                rows_of_text = [
                    TokenRow(run.tokens[i], pos + i, seq_id, i == run.n_tokens - 1) for i in range(start, stop)
                ]
                assert backend.decode(batch(rows_of_text))
        pos += run.n_pos
    return pos


def step(backend: Any, seq_id: int, pos: int, token: int) -> np.ndarray:
    assert backend.decode(batch([TokenRow(token, pos, seq_id, logits=True)]))
    return logits(backend)


def logits(backend: Any) -> np.ndarray:
    return backend.logits(-1).copy()


def test_the_same_prompt_twice_gives_the_same_bits(backend: Any) -> None:
    given = []
    for seq_id in (0, 0, 3):
        backend.kv_remove(seq_id, 0, -1)
        tokenized = tokenize_prompt(backend)
        fill(backend, seq_id, tokenized.chunks)
        tokenized.close()
        given.append(logits(backend))
    np.testing.assert_array_equal(given[0], given[1])
    np.testing.assert_array_equal(given[0], given[2])


def test_a_forked_prefix_gives_the_same_bits_as_a_prompt_of_its_own(backend: Any) -> None:
    """The image is shared, the question is new, and the questions are decoded in the same shapes."""
    first, second = tokenize_prompt(backend, " Where is it?"), tokenize_prompt(backend, " Who is there?")
    end = fill(backend, 0, second.chunks[:-1])
    fill(backend, 0, second.chunks[-1:], end)
    uncached = [logits(backend), step(backend, 0, end + second.chunks[-1].n_pos, 65)]
    backend.kv_remove(0, 0, -1)
    assert fill(backend, 1, first.chunks[:-1]) == end
    fill(backend, 1, first.chunks[-1:], end)
    backend.kv_copy(1, 2, 0, end)
    fill(backend, 2, second.chunks[-1:], end)
    cached = [logits(backend), step(backend, 2, end + second.chunks[-1].n_pos, 65)]
    np.testing.assert_array_equal(uncached[0], cached[0])
    np.testing.assert_array_equal(uncached[1], cached[1])
    assert np.abs(cached[0]).max() > 1
    first.close()
    second.close()


def test_a_fork_lives_on_when_its_source_is_gone(backend: Any) -> None:
    tokenized = tokenize_prompt(backend)
    end = fill(backend, 0, tokenized.chunks)
    expected = step(backend, 0, end, 65)
    backend.kv_remove(0, end, -1)
    backend.kv_copy(0, 1, 0, end)
    backend.kv_remove(0, 0, -1)
    assert backend.kv_last(0) == -1
    np.testing.assert_array_equal(expected, step(backend, 1, end, 65))
    tokenized.close()


def test_other_batch_shapes_stay_within_the_tolerance(backend: Any) -> None:
    tokenized = tokenize_prompt(backend)
    end = fill(backend, 0, tokenized.chunks)
    whole = [logits(backend), step(backend, 0, end, 65)]
    worst = 0.0
    for chunk in (1, 7, 48):
        backend.kv_remove(0, 0, -1)
        assert fill(backend, 0, tokenized.chunks, chunk=chunk) == end
        sliced = [logits(backend), step(backend, 0, end, 65)]
        off = max(float(np.abs(a - b).max()) for a, b in zip(whole, sliced, strict=True))
        assert off < TOLERANCE, f"slices of {chunk}: off by {off}"
        worst = max(worst, off)
    # Beside others in one batch.
    backend.kv_remove(0, 0, -1)
    fill(backend, 0, tokenized.chunks)
    assert fill(backend, 1, tokenized.chunks) == end
    assert backend.decode(batch([TokenRow(65, end, 0, logits=True), TokenRow(66, end, 1, logits=True)]))
    worst = max(worst, float(np.abs(backend.logits(0) - whole[1]).max()))
    assert worst < TOLERANCE
    print(f"{backend.info.name}: other batch shapes are off by {worst:.5f}")
    tokenized.close()


def test_another_image_is_not_within_the_tolerance(backend: Any) -> None:
    given = []
    for seed in (0, 1):
        backend.kv_remove(0, 0, -1)
        tokenized = tokenize_prompt(backend, image=shot(seed=seed))
        fill(backend, 0, tokenized.chunks)
        tokenized.close()
        given.append(logits(backend))
    assert np.abs(given[0] - given[1]).max() > 5 * TOLERANCE


def test_the_memory_knows_the_last_position_of_an_image(backend: Any) -> None:
    tokenized = tokenize_prompt(backend)
    text, *images = tokenized.chunks[:-1]
    pos = fill(backend, 0, [text])
    for run in images:
        fill(backend, 0, [run], pos)
        assert backend.kv_last(0) == pos + run.last_pos
        pos += run.n_pos
    tokenized.close()


def test_an_idle_prefix_of_a_sliding_window_stays_whole_while_others_write(open_kind: Callable[..., Any]) -> None:
    """llama.cpp takes cells outside the window of their only sequence as free, also when the window's memory is full
    size and while others are empty: a prefix lost its beginning, and a fork of it answered wrongly without a word."""
    backend = open_kind("gemma3-tiny")
    try:
        draw = np.random.default_rng(0)
        tokens = [int(token) for token in draw.integers(3, 500, 200)]

        def write(seq_id: int, count: int, pos: int = 0) -> None:
            assert backend.decode(batch([TokenRow(token, pos + i, seq_id) for i, token in enumerate(tokens[:count])]))

        def at(seq_id: int, length: int) -> np.ndarray:
            backend.kv_copy(seq_id, 7, 0, length)
            given = step(backend, 7, length, 65)
            backend.kv_remove(7, 0, -1)
            return given

        for seq_id in (0, 1, 2):
            write(seq_id, 200)
        lengths = (20, 60, 120, 199)
        before = [at(2, length) for length in lengths]
        backend.kv_remove(1, 0, -1)
        write(3, 200)
        for pos in range(200, 300, 20):
            write(3, 20, pos)
        backend.kv_remove(0, 0, -1)
        write(4, 150)
        for length, expected in zip(lengths, before, strict=True):
            # Attention looks at more cells by now, which is another shape.
            off = np.abs(expected - at(2, length)).max()
            assert off < TOLERANCE, f"{length} tokens of the prefix: off by {off}"
    finally:
        backend.close()


def test_a_sliding_window_has_as_many_sequences_as_others(open_kind: Callable[..., Any]) -> None:
    plain, windowed = open_kind("tiny"), open_kind("gemma3-tiny")
    try:
        assert windowed.limits.n_seq_max == plain.limits.n_seq_max
        last = windowed.limits.n_seq_max - 1
        assert windowed.decode(batch([TokenRow(65, 0, last, logits=True)]))
        assert windowed.kv_last(last) == 0
        with pytest.raises(DecodeFailed, match=f"no sequence {last + 1}"):
            windowed.kv_last(last + 1)
        windowed.kv_remove(last, 0, -1)
        for start in range(0, windowed.limits.n_ctx, 256):  # nothing is held by anyone any more: all of it is free
            assert windowed.decode(batch([TokenRow(65, start + i, 0) for i in range(256)]))
    finally:
        plain.close()
        windowed.close()


def test_an_image_larger_than_the_ubatch_is_a_sentence(open_kind: Callable[..., Any]) -> None:
    """Read whole or not at all: llama.cpp itself would end the process."""
    backend = open_kind("gemma3-tiny", ubatch=32)
    tokenized = tokenize_prompt(backend)
    try:
        run = next(run for run in tokenized.chunks if isinstance(run, ImageChunk))
        assert not run.causal
        rows = EmbeddingRows(backend.encode(run), run.positions_at(0, 0, run.n_tokens), 0, causal=False)
        with pytest.raises(DecodeFailed, match=r"64 rows .* ubatch of 32: this model reads an image whole"):
            backend.decode(rows)
        assert backend.kv_last(0) == -1
    finally:
        tokenized.close()
        backend.close()


def test_positions_of_m_rope_are_those_that_mtmd_itself_gives(open_kind: Callable[..., Any]) -> None:
    backend = open_kind("qwen2vl-tiny")
    tokenized = tokenize_prompt(backend)
    try:
        run = next(run for run in tokenized.chunks if isinstance(run, ImageChunk))
        info = tokenized.images[0]
        columns, rows = info.resized_width // 28, info.resized_height // 28
        assert (run.n_tokens, run.n_pos) == (columns * rows, max(columns, rows))
        time, height, width, fourth = run.positions_at(100, 0, run.n_tokens)
        assert set(time) == {100}
        np.testing.assert_array_equal(height, 100 + np.arange(run.n_tokens) // columns)
        np.testing.assert_array_equal(width, 100 + np.arange(run.n_tokens) % columns)
        assert set(fourth) == {0}
        np.testing.assert_array_equal(run.positions_at(100, 3, 9), run.positions_at(100, 0, run.n_tokens)[:, 3:9])
    finally:
        tokenized.close()
        backend.close()
