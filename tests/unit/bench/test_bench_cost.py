"""Bytes and operations of a model, read from its header and checked by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from opsin.bench import cost
from opsin.bench.cost import Ceiling, encode_ops_of, image_cost, read_cost
from opsin.models import Pair
from opsin.models.gguf import TensorHead
from opsin.models.shapes import SHAPES
from synth import write_pair


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("tiny"), quantisation="f16")


def test_a_decode_step_reads_every_weight_once_but_the_embedding_table(tiny: Pair) -> None:
    text = SHAPES["tiny"].text
    layer = 2 * text.width**2 + 2 * text.width * text.kv_width + 3 * text.width * text.feed_forward
    found = read_cost(tiny.llm, tiny.mmproj)
    assert found.weights == text.layers * layer
    assert found.head == text.width * text.vocabulary
    assert found.weight_bytes == pytest.approx(2 * (found.weights + found.head))
    assert found.kv_values == 2 * text.kv_width * text.layers
    assert found.decode_bytes([100, 50]) - found.decode_bytes([0]) == 150 * found.kv_values * 2
    ceiling = Ceiling("", read_bytes_s=math.inf, matrix_ops_s=1.0)  # so seconds are operations
    assert found.step_seconds(ceiling, [0]) == 2 * (found.weights + found.head)
    assert found.step_seconds(ceiling, [10]) - found.step_seconds(ceiling, [0]) == 4 * 10 * text.width * text.layers
    assert found.prompt_seconds(ceiling, 1) == 2 * found.weights


def test_an_encode_runs_all_blocks_but_the_last_and_the_projector(tiny: Pair) -> None:
    shape = SHAPES["tiny"]
    vision, patches = shape.vision, shape.vision.patches
    block = 4 * vision.width**2 + 2 * vision.width * vision.feed_forward
    blocks = vision.layers - 1
    matrices = blocks * block + 3 * vision.patch_size**2 * vision.width
    matrices += vision.width * shape.text.width + shape.text.width**2
    attention = blocks * 4 * patches**2 * vision.width
    found = read_cost(tiny.llm, tiny.mmproj)
    assert found.encode_ops == pytest.approx(2 * patches * matrices + attention)


def test_quantised_weights_and_memory_are_counted_in_their_own_bytes(tiny: Pair, tmp_path: Path) -> None:
    small = write_pair("tiny", tmp_path, quantisation="q8_0")
    half, eight = read_cost(tiny.llm, None), read_cost(small.llm, None, "q8_0")
    assert half.encode_ops is None
    assert eight.weight_bytes / half.weight_bytes == pytest.approx(34 / 64, rel=0.02)
    assert eight.decode_bytes([10]) - eight.weight_bytes == pytest.approx(10 * eight.kv_values * 34 / 32)


@pytest.mark.parametrize("kind", ["idefics3", "internvl"])
def test_tiles_that_a_file_does_not_count_are_not_guessed(
    tiny: Pair, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """SmolVLM and InternVL cut images by their size: the whole image alone would be off by a factor."""
    read = cost.read_info
    monkeypatch.setattr(cost, "read_info", lambda path: replace(read(path), projector=kind))
    assert tiny.mmproj is not None
    image = image_cost(tiny.mmproj)
    assert (image.tokens, image.ops) == (0, None)
    assert "images are left out" in (image.note or "")
    assert read_cost(tiny.llm, tiny.mmproj).encode_ops is None


@pytest.mark.parametrize("shape", ["llava-1.6-tiny", "qwen2vl-tiny", "gemma3-tiny"])
def test_only_images_of_one_size_have_one_cost(shape: str, tmp_path: Path) -> None:
    pair = write_pair(shape, tmp_path)
    assert pair.mmproj is not None
    image = image_cost(pair.mmproj)
    known = read_cost(pair.llm, pair.mmproj).encode_ops
    assert known == (image.ops if shape == "gemma3-tiny" else None)
    assert (image.note is None) == (shape == "gemma3-tiny")


def test_merged_patches_reach_the_projector_as_fewer_tokens() -> None:
    heads = [
        TensorHead("v.blk.0.ffn_up.weight", (8, 16), "F16", 0),
        TensorHead("v.blk.1.attn_out.weight", (8, 8), "F16", 0),
        TensorHead("mm.0.weight", (32, 10), "F16", 0),
    ]
    block, last, projector = 2 * 8 * 16 * 64, 2 * 8 * 8 * 64 + 4 * 64**2 * 8, 2 * 32 * 10 * 64
    assert encode_ops_of(heads, 64, 2) == block + projector
    assert encode_ops_of(heads, 64, 2, all_layers=True) == block + last + projector
    assert encode_ops_of(heads, 64, 2, merge=2, all_layers=True) == block + last + projector / 4
