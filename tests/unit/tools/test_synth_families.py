"""Pairs shaped after other families than LLaVA-1.5: what their files hold, and what their vocabularies can say."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from opsin.core.errors import BadParameter
from opsin.models.pairing import check_pair
from synth import SHAPES, write_pair
from synth.text import llm_tensors
from synth.vision import clip_tensors
from synth.vocabulary import BPE_SPACE, make_bpe_vocabulary, make_vocabulary

CONTROL = ("<|a|>", "<|b|>")


@pytest.mark.parametrize(
    ("shape", "architecture", "projector"),
    [
        ("llava-1.6-tiny", "llama", "mlp"),
        ("qwen2vl-tiny", "qwen2vl", "qwen2vl_merger"),
        ("gemma3-tiny", "gemma3", "gemma3"),
    ],
)
@pytest.mark.parametrize("quantisation", ["f16", "q8_0"])
def test_the_two_files_of_a_family_belong_together(
    shape: str, architecture: str, projector: str, quantisation: str, tmp_path: Path
):
    pair = write_pair(shape, tmp_path, quantisation=quantisation)
    text, vision = check_pair(pair.llm, pair.mmproj)
    assert (text.architecture, vision.projector) == (architecture, projector)
    assert text.width == vision.projector_width == SHAPES[shape].text.width
    assert sum(path.stat().st_size for path in (pair.llm, pair.mmproj)) < 2e6


def test_tiles_are_cut_by_the_grids_of_the_file(tmp_path: Path):
    fields = gguf.GGUFReader(write_pair("llava-1.6-tiny", tmp_path).mmproj).fields
    assert fields["clip.vision.image_grid_pinpoints"].contents() == [56, 112, 112, 56, 112, 112, 168, 56, 56, 168]
    assert fields["clip.vision.mm_patch_merge_type"].contents() == "spatial_unpad"


def test_a_window_is_narrower_than_an_image_so_that_tests_reach_over_it():
    shape = SHAPES["gemma3-tiny"]
    assert 0 < shape.text.window < shape.vision.patches // shape.vision.merge**2


def test_sections_turn_every_pair_of_a_heads_values():
    text = SHAPES["qwen2vl-tiny"].text
    assert sum(text.sections) == text.width // text.heads // 2


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_no_tensor_is_named_twice(shape):
    for tensors in (llm_tensors(shape, "f16"), clip_tensors(shape, "f16")):
        names = [tensor.name for tensor in tensors]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("size", [258, 512, 4000])
def test_bpe_merges_make_every_word_from_tokens_before_it(size: int):
    vocabulary = make_bpe_vocabulary(size, CONTROL)
    words = vocabulary.tokens[256:-2]
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(set(vocabulary.tokens)) == size
    assert vocabulary.tokens[-2:] == CONTROL
    assert vocabulary.types[-3:] == (1, 3, 3)
    assert len(vocabulary.merges) == len(words)
    known = set(vocabulary.tokens[:256])
    for merge, word in zip(vocabulary.merges, words, strict=True):
        left, right = merge.split(" ")
        assert {left, right} <= known
        assert left + right == word
        known.add(word)


def test_bpe_bytes_are_gpt_2s():
    tokens = make_bpe_vocabulary(258, CONTROL).tokens
    assert (tokens[ord("a")], tokens[ord(" ")], tokens[ord("\n")], tokens[0xFF]) == ("a", BPE_SPACE, "\u010a", "ÿ")


def test_control_tokens_take_the_place_of_words():
    plain, other = make_vocabulary(512), make_vocabulary(512, CONTROL)
    assert other.tokens == (*plain.tokens[:-2], *CONTROL)
    assert other.types[-2:] == (3, 3)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(BadParameter, match="at least 258 tokens, 257 are too few"):
        make_bpe_vocabulary(257, CONTROL)
    with pytest.raises(BadParameter, match="at least 356"):
        make_vocabulary(355, CONTROL)
