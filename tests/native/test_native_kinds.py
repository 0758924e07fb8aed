"""The engine on every kind of image model: shared images, many at once, and cells that add up."""

import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from opsin import Opsin
from opsin.core.answer import Answer
from opsin.core.errors import BadParameter, Cancelled, OpsinError
from opsin.core.model_info import HOST
from opsin.core.request import EmbeddingRows, Image, ImageChunk, ImagePart, Prompt, SamplingParams, TextPart
from opsin.core.settings import EngineSettings
from opsin.engine import Engine, Policy
from opsin.models.facts import read_facts
from opsin.native.memory import MemoryPlanner
from opsin.native.model import Model
from synth import KINDS, write_pair

SIZES = ((240, 60), (60, 240), (100, 100), (20, 16), (640, 480))
KEEP_SIZES = ("qwen2vl-tiny", "qwen2.5vl-tiny", "qwen3vl-tiny", "pixtral-tiny", "kimivl-tiny", "glm4v-tiny")
# Those that keep an image's size would make thousands of tokens of a large one; two have a least number besides.
IMAGE_MAX_TOKENS = {**dict.fromkeys(KEEP_SIZES, 64), "gemma4-tiny": 100, "lfm2vl-tiny": 100}
TOLERANCE = 0.05
"""Natural log probability between batch shapes."""

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, guard=False, logprobs=20)


def shot(width: int, height: int, seed: int = 0) -> Image:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8).tobytes()
    return Image(rgb, width, height, hashlib.sha256(rgb).hexdigest(), "PNG")


def prompt(question: str, *images: Image) -> Prompt:
    return Prompt((TextPart("USER: look at "), *map(ImagePart, images), TextPart(question)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    from opsin.native import open_backend

    made: dict[str, Any] = {}

    def opened(kind: str, **settings: Any) -> Any:
        if kind not in made:
            made[kind] = write_pair(kind, Path(tmp_path_factory.mktemp(kind)), quantisation="f16")
        pair = made[kind]
        wanted = {"model": pair.llm, "mmproj": pair.mmproj, "ctx": 2048, "parallel": 4, "ubatch": 256, "threads": 1}
        most = IMAGE_MAX_TOKENS.get(kind)
        return open_backend(EngineSettings(**{**wanted, "image_max_tokens": most, **settings}))

    return opened


@pytest.fixture(scope="module")
def photo() -> Image:
    return shot(4000, 3000)


def agree(one: Answer, other: Answer) -> bool:
    """The same tokens with the same log probabilities, up to a choice that another rounding may turn."""
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        if abs(mine.top[0][2] - theirs.top[0][2]) > TOLERANCE:
            return False
        if mine.token != theirs.token:
            return mine.top[0][2] - mine.top[1][2] < TOLERANCE
    return True


def all_but_one(engine: Engine, answer: Answer) -> int:
    """What the KV cache has of a prompt that was asked before: nothing where a model has one state a sequence."""
    return answer.usage.prompt_tokens - 1 if engine.limits.forks else 0


@pytest.mark.parametrize("kind", KINDS)
def test_many_at_once_and_remembered_answer_as_one_alone_does(
    kind: str, pairs: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    asked = [prompt(f" {question}", shot(*size)) for size in SIZES for question in ("Who is there?", "How many?")]
    asked.append(prompt(" Which is larger?", shot(*SIZES[0]), shot(*SIZES[1])))
    with Engine(lambda: pairs(kind), policy=Policy(keep_prefixes=False)) as engine:
        alone = [engine.submit(each, PARAMS).result() for each in asked]
        assert {answer.usage.cached_tokens for answer in alone} == {0}
    with Engine(lambda: pairs(kind), policy=Policy(parallel=4)) as engine:
        record_property("keeps_prefixes", engine.limits.forks)
        for streams in ([engine.submit(each, PARAMS) for each in asked] for _ in range(2)):
            together = [stream.result() for stream in streams]
            for number, (one, other) in enumerate(zip(alone, together, strict=True)):
                assert agree(one, other), f"request {number}"
        # The second time round everything but the last token is in the memory.
        assert all(answer.usage.cached_tokens == all_but_one(engine, answer) for answer in together)
        assert engine.error is None
    with Engine(lambda: pairs(kind, parallel=4, ctx=8192, kv_unified=False), policy=Policy(parallel=4)) as engine:
        for _ in range(2):
            apart = [stream.result() for stream in [engine.submit(each, PARAMS) for each in asked]]
            assert all(agree(*each) for each in zip(alone, apart, strict=True))
        assert any(answer.usage.cached_tokens for answer in apart) == engine.call(lambda backend: backend.limits.forks)
        assert engine.error is None


@pytest.mark.parametrize("kind", ["llava-1.6-tiny", "qwen2vl-tiny", "qwen3vl-tiny", "gemma3-tiny", "lfm2vl-tiny"])
def test_batches_in_parts_as_on_several_gpus_give_the_same(
    kind: str, pairs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [prompt(" What is there?" * 20, shot(*size)) for size in SIZES]

    def ask() -> tuple[list[Answer], int]:
        with Engine(lambda: pairs(kind)) as engine:
            parts = engine.call(lambda backend: backend._llama.llama_n_ubatch(backend.handle.pointer))
            assert engine.limits.n_ubatch == 256
            return [engine.submit(each, PARAMS).result() for each in asked], parts

    whole, _ = ask()
    monkeypatch.setattr(Model, "several_devices", True)
    in_parts, rows = ask()
    assert rows == (256 if kind == "gemma3-tiny" else 64), "an image that is read at once stays in one part"
    assert all(agree(*each) for each in zip(whole, in_parts, strict=True))


@pytest.mark.parametrize("kind", ["gemma3-tiny", "gemma4-tiny"])
def test_windows_alone_answer_as_everything_does_and_remember_nothing(kind: str, pairs: Callable[..., Any]) -> None:
    asked = [prompt(f" {question}" * 12, shot(*size)) for size in SIZES for question in ("Who?", "How many?")]
    with Engine(lambda: pairs(kind), policy=Policy(keep_prefixes=False)) as engine:
        alone = [engine.submit(each, PARAMS).result() for each in asked]
    with Engine(lambda: pairs(kind, swa_full=False), policy=Policy(parallel=4)) as engine:
        assert not engine.limits.forks
        for _ in range(2):
            together = [stream.result() for stream in [engine.submit(each, PARAMS) for each in asked]]
            assert all(agree(*each) for each in zip(alone, together, strict=True))
            assert {answer.usage.cached_tokens for answer in together} == {0}
        assert engine.error is None


_LOGGED = """
import sys
from opsin.core.settings import EngineSettings
from opsin.native import open_backend
open_backend(EngineSettings.model_validate_json(sys.argv[1])).close()
"""


@pytest.mark.parametrize("swa_full", [True, False])
def test_the_kv_cache_of_a_sliding_window_is_as_large_as_was_planned(tmp_path: Path, *, swa_full: bool) -> None:
    pair = write_pair("gemma3-tiny", tmp_path)
    settings = EngineSettings(
        model=pair.llm, ctx=16384, parallel=4, ubatch=256, threads=1, swa_full=swa_full, verbose=True
    )
    command = [sys.executable, "-c", _LOGGED, settings.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    logged = sum(map(float, re.findall(r"KV buffer size = +([\d.]+) MiB", done.stderr)))
    planned = MemoryPlanner(read_facts(pair.llm, None), (), settings, {}).needed().by_device[HOST].kv
    assert logged * 2**20 == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_swapped_out_answers_as_it_did_and_answers_other_questions(
    kind: str, pairs: Callable[..., Any]
) -> None:
    def ask(engine: Engine, question: str) -> list[Answer]:
        prompts = [prompt(question, shot(*size, seed)) for seed, size in enumerate(SIZES[:3])]
        return [engine.submit(each, PARAMS).result() for each in prompts]

    with Engine(lambda: pairs(kind), policy=Policy(keep_prefixes=False)) as engine:
        others = ask(engine, " How many?")
    with Engine(lambda: pairs(kind), policy=Policy(parallel=2, swap_cells=4096)) as engine:
        first, again, more = ask(engine, " Who is there?"), ask(engine, " Who is there?"), ask(engine, " How many?")
        if engine.limits.swaps and engine.limits.forks:
            assert engine.stats.cells_used < 2 * more[2].usage.prompt_tokens, "the others are in main memory"
        assert all(answer.usage.cached_tokens == all_but_one(engine, answer) for answer in again)
        if engine.limits.forks:
            assert all(answer.usage.cached_tokens > answer.usage.image_tokens for answer in more)
    assert all(agree(*pair) for pair in (*zip(first, again, strict=True), *zip(others, more, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_goes_away_behind_its_image_leaves_the_books_right(kind: str, pairs: Callable[..., Any]) -> None:
    """Under M-RoPE an image's cells share one position, so a prefix that ends in one ends before its next position."""
    backend = pairs(kind, ubatch=512)  # half an image would be no unit of the cache
    decode, streams, submitted = backend.decode, [], threading.Event()

    def decode_and_go(rows: Any, **how: Any) -> bool:
        assert submitted.wait(60)
        done = decode(rows, **how)
        if isinstance(rows, EmbeddingRows) and streams:
            streams.pop().cancel()
        return done

    backend.decode = decode_and_go
    with Engine(lambda: backend, policy=Policy(parallel=2)) as engine:
        first = prompt(" Who is there?", shot(240, 60))
        stream = engine.submit(first, PARAMS)
        streams.append(stream)
        submitted.set()
        with pytest.raises(Cancelled):
            stream.result()
        for _ in range(2):  # the first may come before the end is swept up; the engine checks its books before the next
            engine._loop.call(lambda _: None).result()
        assert engine.error is None
        answer = engine.submit(first, PARAMS).result()
        assert not engine.limits.forks or answer.usage.cached_tokens > 15  # the text, and an image or its first tile
        again = engine.submit(first, PARAMS).result()
        assert agree(answer, again)
        assert engine.error is None


def test_an_image_larger_than_the_ubatch_fails_alone(pairs: Callable[..., Any]) -> None:
    with Engine(lambda: pairs("gemma3-tiny", ubatch=32)) as engine:
        with pytest.raises(OpsinError, match="must read in one batch"):
            engine.submit(prompt(" Who?", shot(50, 50)), PARAMS).result()
        assert engine.submit(prompt(" Who?"), PARAMS).result().usage.completion_tokens == 6
        assert engine.error is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_laid_out_without_its_pixels_is_the_same_image(kind: str, pairs: Callable[..., Any]) -> None:
    backend = pairs(kind)
    try:
        for size in SIZES:
            parts = [TextPart("look "), ImagePart(shot(*size)), TextPart(" there")]
            whole = backend.tokenize(parts, add_bos=True)
            placeholder = backend.tokenize(parts, add_bos=True, known=lambda _: True)
            assert whole.chunks == tuple(
                replace(run, placeholder=False) if isinstance(run, ImageChunk) else run for run in placeholder.chunks
            )
            assert whole.images == placeholder.images
            for one, other in zip(whole.chunks, placeholder.chunks, strict=True):
                if isinstance(one, ImageChunk):
                    assert not one.placeholder
                    assert other.placeholder
                    np.testing.assert_array_equal(
                        one.positions_at(7, 0, one.n_tokens), other.positions_at(7, 0, one.n_tokens)
                    )
            whole.close()
            placeholder.close()
    finally:
        backend.close()


def test_rows_of_pixtral_end_with_the_embedding_of_the_file(pairs: Callable[..., Any]) -> None:
    """llama.cpp adds it to memory that it never wrote, which is not always a number."""
    backend = pairs("pixtral-tiny")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(backend.settings.mmproj).tensors}
    try:
        for size in SIZES:
            with closing(backend.tokenize([ImagePart(shot(*size))], add_bos=False)) as tokenized:
                rows = backend.encode(tokenized.chunks[0])
                lines = tokenized.images[0].resized_height // 14
            each = (len(rows) + 1) // lines
            assert (rows[each - 1 :: each] == tensors["v.token_embd.img_break"]).all(axis=1).sum() == lines - 1
    finally:
        backend.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_photo_of_12_megapixels_is_answered_and_remembered(
    kind: str, pairs: Callable[..., Any], photo: Image
) -> None:
    with Engine(lambda: pairs(kind, parallel=1)) as engine:
        first, again = (engine.submit(prompt(" Who is there?", photo), PARAMS).result() for _ in range(2))
        assert first.usage.completion_tokens == again.usage.completion_tokens == 6
        assert first.usage.image_tokens > 0
        assert again.usage.cached_tokens == all_but_one(engine, again)
        assert engine.error is None
    assert agree(first, again)


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_sees_every_kind_at_work(kind: str, pairs: Callable[..., Any]) -> None:
    backend = pairs(kind)
    try:
        placement = backend.placement()
        for shares in (placement.encoder, placement.language_model):
            assert sum(share.nodes for share in shares.values()) > 10
    finally:
        backend.close()


def test_a_model_with_a_sliding_window_refuses_parts_of_the_kv_cache(tmp_path: Path) -> None:
    """Cells behind the window are not saved, so that a fork could be no copy."""
    pair = write_pair("gemma3-tiny", tmp_path)
    with pytest.raises(BadParameter, match="--no-kv-unified"):
        Opsin(pair.llm, pair.mmproj, config=False, kv_unified=False)
