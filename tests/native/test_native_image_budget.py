"""Budgets on real projectors: the numbers of headers are llama.cpp's, and the largest budget needs no flag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opsin import Opsin
from opsin.core.image_options import ImageSizes
from opsin.images.show import size_within
from opsin.models import Pair
from synth import write_pair

pytestmark = pytest.mark.slow

KEEP_SIZE = (
    "qwen2vl-tiny", "qwen2.5vl-tiny", "qwen3vl-tiny", "gemma4-tiny", "pixtral-tiny", "kimivl-tiny", "glm4v-tiny",
    "lfm2vl-tiny", "paddleocr-tiny",
)  # fmt: skip
OTHERS = ("tiny", "llava-1.6-tiny", "gemma3-tiny", "smolvlm-tiny", "internvl-tiny", "minicpmv-tiny")
PARAMS = {"temperature": 0, "max_tokens": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(kind: str) -> Pair:
        if kind not in made:
            made[kind] = write_pair(kind, Path(tmp_path_factory.mktemp(kind)), quantisation="f16")
        return made[kind]

    return pair


@pytest.fixture
def opened(pairs: Callable[[str], Pair]) -> Callable[..., Opsin]:
    return lambda kind, **options: Opsin(pairs(kind).llm, pairs(kind).mmproj, config=False, disk_cache=False, **options)


def pixels(width: int, height: int) -> np.ndarray[Any, Any]:
    coarse = np.random.default_rng(width).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)[:height, :width]


@pytest.mark.parametrize("kind", KEEP_SIZE)
def test_a_budget_is_kept_and_the_image_stays_as_we_resized_it(kind: str, opened: Callable[..., Opsin]) -> None:
    with opened(kind) as model:
        sizes = model.engine.limits.images
        assert sizes.cell
        for width, height in ((1600, 1200), (500, 1900), (1500, 90)):
            shot = pixels(width, height)
            for budget in (sizes.least + 4, 60):
                if budget < sizes.least:
                    continue
                answer = model.ask(shot, "What?", image_max_tokens=budget, **PARAMS)
                (seen,) = answer.images
                across, down = size_within(width, height, budget, sizes.cell)
                assert (seen.width, seen.height) == (across, down)
                if across * down >= sizes.least * sizes.cell**2:  # else llama.cpp makes it larger again
                    assert (seen.resized_width, seen.resized_height, seen.tiles) == (across, down, 1)
                    assert across * down // sizes.cell**2 <= budget
                    rows = down // sizes.cell  # Pixtral and LFM2 have a token more a row, or around
                    assert seen.tokens <= budget + rows


@pytest.mark.parametrize("kind", [kind for kind in KEEP_SIZE if kind != "lfm2vl-tiny"])  # it makes tiles of more
def test_no_image_has_more_tokens_than_the_header_says(kind: str, opened: Callable[..., Opsin]) -> None:
    with opened(kind, image_max_tokens=90) as model:
        sizes = model.engine.limits.images
        assert sizes.most == (64 if kind == "paddleocr-tiny" else 90)  # as its header says
        answer = model.ask(pixels(3000, 2000), "What?", **PARAMS)
        assert answer.images[0].width * answer.images[0].height <= sizes.most * sizes.cell**2
        assert "resized" in answer.images[0].notes[-1]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_say_that_a_budget_changes_nothing(kind: str, opened: Callable[..., Opsin]) -> None:
    shot = pixels(300, 200)
    with opened(kind) as model:
        usual = model.ask(shot, "What?", **PARAMS)
        asked = model.ask(shot, "What?", image_max_tokens=9, **PARAMS)
        assert model.engine.limits.images == ImageSizes(edge=model.engine.limits.images.edge)
    assert asked.images[0].tokens == usual.images[0].tokens
    assert [len(usual.images[0].notes), len(asked.images[0].notes)] == [0, 1]


@pytest.mark.parametrize("kind", ["gemma4-tiny", "qwen2.5vl-tiny", "smolvlm-tiny"])
def test_a_photo_of_twelve_megapixels_needs_no_flag(kind: str, opened: Callable[..., Opsin]) -> None:
    with opened(kind) as model:
        answer = model.ask(pixels(4000, 3000), "What is this?", **PARAMS)
        assert answer.usage.completion_tokens == 2
        most = model.engine.limits.images.most
        assert answer.usage.image_tokens > (0.9 * most if most else 50)


def test_the_largest_image_of_a_model_that_reads_it_at_once_fits_its_ubatch(opened: Callable[..., Opsin]) -> None:
    """1,120 tokens in both directions, with a ubatch that is 1,024 otherwise; and more where the setting says so."""
    with opened("gemma4-tiny") as model:
        assert model.ask(pixels(35 * 48, 32 * 48), "What?", **PARAMS).images[0].tokens == 1120
    with opened("gemma4-tiny", image_max_tokens=1500, ubatch=64) as model:
        assert 1400 < model.ask(pixels(4000, 3000), "What?", **PARAMS).images[0].tokens <= 1500


def test_parts_and_tiles_are_images_of_their_own(opened: Callable[..., Opsin]) -> None:
    shot = pixels(640, 480)
    with opened("tiny") as model:
        tiled = model.ask(shot, "What?", image_tiles="2x2", **PARAMS)
        assert [(image.width, image.height) for image in tiled.images] == [(640, 480), *[(320, 240)] * 4]
        part = model.ask(shot, "What?", image_region="50%,0,50%,50%", **PARAMS)
        assert part.images[0].cached, "the same pixels as the second tile"
        assert part.images[0].sha256 == tiled.images[2].sha256 == model.image(shot[:240, 320:]).sha256
        conversation = model.images(shot, tiles="2x2")
        assert [image.sha256 for image in conversation] == [image.sha256 for image in tiled.images]
