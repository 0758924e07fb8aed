"""Frames of a video on real encoders: Qwen's merge two of them, all others read them one by one."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opsin.core.request import Image, ImageChunk, ImagePart, Part, Prompt, SamplingParams, TextPart, TokenizedPrompt
from opsin.core.settings import EngineSettings
from opsin.engine import Engine, Policy
from opsin.native.frames import mergeable
from synth import write_pair

pytestmark = [pytest.mark.slow, pytest.mark.native]

MERGING = ("qwen2vl-tiny", "qwen2.5vl-tiny", "qwen3vl-tiny")
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, guard=False)


def shot(seed: int, frame: int | None = None, width: int = 100, height: int = 60) -> Image:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8).tobytes()
    return Image(rgb, width, height, hashlib.sha256(rgb + bytes([width])).hexdigest(), "PNG", frame=frame)


def frames(*seeds: int) -> list[Image]:
    return [shot(seed, number) for number, seed in enumerate(seeds)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    from opsin.native import open_backend

    pairs: dict[str, Any] = {}

    def backend(kind: str) -> Any:
        if kind not in pairs:
            pairs[kind] = write_pair(kind, Path(tmp_path_factory.mktemp(kind)), quantisation="f16")
        settings = {"ctx": 2048, "parallel": 2, "ubatch": 256, "threads": 1, "image_max_tokens": 64}
        return open_backend(EngineSettings(model=pairs[kind].llm, mmproj=pairs[kind].mmproj, **settings))

    return backend


@pytest.fixture(params=MERGING)
def qwen(request: pytest.FixtureRequest, opened: Callable[[str], Any]) -> Iterator[Any]:
    with closing(opened(request.param)) as backend:
        yield backend


def tokenized(backend: Any, *parts: Image | str, **options: Any) -> TokenizedPrompt:
    made: list[Part] = [ImagePart(part) if isinstance(part, Image) else TextPart(part) for part in parts]
    result: TokenizedPrompt = backend.tokenize(made, add_bos=True, **options)
    return result


def chunks(prompt: TokenizedPrompt) -> list[ImageChunk]:
    return [chunk for chunk in prompt.chunks if isinstance(chunk, ImageChunk)]


def test_only_pairs_of_one_video_and_one_size_may_be_merged() -> None:
    first, second = frames(1, 2, 3), frames(4, 5)
    assert mergeable(["text", *first, *second]) == {0, 1, 3, 4}
    assert mergeable([first[0], "text", first[1]]) == set()
    assert mergeable([shot(1), shot(2)]) == set()
    assert mergeable([first[0], shot(2, 1, 64)]) == set()
    assert mergeable([first[1], first[0], first[1], first[2]]) == {1, 2}


def test_two_frames_cost_the_tokens_of_one(qwen: Any) -> None:
    for count, groups in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3)):
        with closing(tokenized(qwen, "look ", *(shot(n) for n in range(count)), "?")) as apart:
            each = chunks(apart)[0].n_tokens
        with closing(tokenized(qwen, "look ", *frames(*range(count)), "?")) as merged:
            assert [chunk.n_tokens for chunk in chunks(merged)] == [each] * groups
            assert sum(chunk.frames for chunk in chunks(merged)) == count
            assert apart.n_image_tokens == count * each
            assert merged.n_image_tokens == sum(info.tokens for info in merged.images) == groups * each
            assert len({(info.resized_width, info.resized_height) for info in merged.images}) == 1
            assert all(info.tiles == 1 for info in merged.images)
            said = " ".join(merged.images[0].notes)
            assert ("merges frames in pairs" in said) == (count > 1), said


def test_an_embedding_is_that_of_both_frames_in_their_order(qwen: Any) -> None:
    def of(*images: Image) -> tuple[str, Any]:
        with closing(tokenized(qwen, *images)) as prompt:
            (chunk,) = chunks(prompt)
            return chunk.identity, qwen.encode(chunk)

    a, b = shot(1, 0), shot(2, 0)
    names, rows = zip(
        of(a), of(a, replace(a, frame=1)), of(a, replace(b, frame=1)), of(b, replace(a, frame=1)), strict=True
    )
    assert len(set(names)) == 4
    assert np.array_equal(rows[0], rows[1]), "a still image is two equal frames"
    assert np.abs(rows[2] - rows[0]).max() > 0.1
    assert np.abs(rows[2] - rows[3]).max() > 0.1


def test_frames_of_two_videos_are_never_merged(qwen: Any) -> None:
    with closing(tokenized(qwen, *frames(1, 2, 3), *frames(4, 5))) as prompt:
        assert [(chunk.image, chunk.frames) for chunk in chunks(prompt)] == [(0, 2), (2, 1), (3, 2)]


def test_known_frames_need_no_pixels_and_one_new_one_makes_its_pair_new(qwen: Any) -> None:
    with closing(tokenized(qwen, *frames(1, 2, 3, 4))) as prompt:
        known = {chunk.identity for chunk in chunks(prompt)}
    with closing(tokenized(qwen, *frames(1, 2, 3, 4), known=known.__contains__)) as prompt:
        assert [chunk.placeholder for chunk in chunks(prompt)] == [True, True]
    with closing(tokenized(qwen, *frames(1, 2, 3, 9), known=known.__contains__)) as prompt:
        assert [chunk.placeholder for chunk in chunks(prompt)] == [True, False]
        assert qwen.encode(chunks(prompt)[1]).shape[0] == chunks(prompt)[1].n_tokens


@pytest.mark.parametrize("kind", MERGING)
def test_a_video_asked_about_again_is_remembered(kind: str, opened: Callable[[str], Any]) -> None:
    def prompt(question: str) -> Prompt:
        return Prompt((TextPart("look: "), *map(ImagePart, frames(1, 2, 3)), TextPart(question)))

    with Engine(lambda: opened(kind), policy=Policy()) as engine:
        first = engine.submit(prompt("what?"), PARAMS).result()
        again = engine.submit(prompt("what?"), PARAMS).result()
    assert [image.cached for image in first.images] == [False] * 3
    assert [image.cached for image in again.images] == [True] * 3
    assert (again.text, again.usage.image_tokens) == (first.text, first.usage.image_tokens)
    assert again.stages.encode_ms == 0


@pytest.mark.parametrize("kind", ["gemma3-tiny", "smolvlm-tiny", "tiny"])
def test_other_models_read_the_frames_one_by_one_and_say_so(kind: str, opened: Callable[[str], Any]) -> None:
    with closing(opened(kind)) as backend, closing(tokenized(backend, *frames(1, 2, 3))) as prompt:
        assert {chunk.frames for chunk in chunks(prompt)} == {1}
        assert all(info.tokens for info in prompt.images)
        assert "reads 3 images" in " ".join(prompt.images[0].notes)
        assert prompt.images[1].notes == ()
