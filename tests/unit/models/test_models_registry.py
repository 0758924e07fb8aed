from __future__ import annotations

import re

import pytest

from opsin.core.errors import ModelNotFound
from opsin.models.registry import _NAMES, KNOWN_MODELS, _normal, look_up
from opsin.models.shapes import KNOWN_SHAPES, SHAPES


def test_rows_are_well_formed():
    names = [row.name for row in KNOWN_MODELS]
    assert len(set(names)) == len(names)
    for row in KNOWN_MODELS:
        assert re.fullmatch(r"[a-z0-9.-]+", row.name)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", row.repo)
        assert (row.llm_file is None) == (row.mmproj_file is None)


@pytest.mark.parametrize("row", KNOWN_MODELS, ids=lambda row: row.name)
def test_every_known_model_has_sizes_and_a_licence(row):
    shape = KNOWN_SHAPES[row.name]
    assert row.licence
    assert shape.text.width % 64 == 0
    assert shape.text.heads % shape.text.kv_heads == 0
    assert 0 <= shape.text.experts_used <= shape.text.experts
    projector = list(shape.vision.projector)
    assert projector[-1:] in ([], [shape.text.width])
    tokens = shape.vision.tile_tokens or shape.vision.patches
    assert 0 < tokens <= shape.vision.patches


def test_no_name_means_two_models():
    claimed = [_normal(name) for row in KNOWN_MODELS for name in {row.name, *row.aliases}]
    assert len(set(claimed)) == len(claimed)
    for row in KNOWN_MODELS:
        assert _NAMES[_normal(row.name)] is row
        assert _NAMES[_normal(row.title)] is row


def test_every_family_users_ask_for_is_known():
    known = " ".join(row.name for row in KNOWN_MODELS)
    families = "llava-1.5-7b llava-1.5-13b llava-1.6 smolvlm2 qwen2.5-vl qwen3-vl gemma-3 internvl3 paddleocr-vl"
    for family in (*families.split(), "deepseek-ocr", "kimi-vl", "kimi-k2.5", "glm-4", "minicpm-v"):
        assert family in known


@pytest.mark.parametrize(
    "text", ["llava-1.5-7b", "LLaVA 1.5 7B", "llava1.5", "llava", "Llava-v1.5-7B", "llava_v1.5_7b"]
)
def test_names_are_forgiving(text: str):
    assert look_up(text).known.name == "llava-1.5-7b"


def test_a_tag_follows_a_colon():
    wanted = look_up("smolvlm2:Q8_0")
    assert (wanted.repo, wanted.tag, wanted.name) == (
        "ggml-org/SmolVLM2-2.2B-Instruct-GGUF",
        "Q8_0",
        "smolvlm2-2.2b:Q8_0",
    )


def test_any_repository_can_be_named():
    wanted = look_up("hf:Some-One/A.Model_v2-GGUF:Q5_K_M")
    assert (wanted.repo, wanted.tag, wanted.known) == ("Some-One/A.Model_v2-GGUF", "Q5_K_M", None)
    assert wanted.name == "hf:Some-One/A.Model_v2-GGUF:Q5_K_M"


def test_a_repository_we_know_gets_its_short_name():
    assert look_up("hf:ggml-org/gemma-3-4b-it-GGUF").name == "gemma-3-4b"


@pytest.mark.parametrize("text", ["hf:", "hf:one", "hf:a/b/c", "hf:../x", "hf:a/..", "hf:a b/c", "hf:/a"])
def test_what_is_no_repository_is_refused(text: str):
    with pytest.raises(ModelNotFound, match="write hf:OWNER/NAME"):
        look_up(text)


def test_a_repository_without_the_prefix_is_told_about_it():
    with pytest.raises(ModelNotFound, match="for a repository write hf:ggml-org/other-GGUF:Q4_0"):
        look_up("ggml-org/other-GGUF:Q4_0")


def test_a_slip_of_the_pen_is_met_with_the_nearest_name():
    with pytest.raises(ModelNotFound, match=r"did you mean .*smolvlm2-2\.2b"):
        look_up("smolvml2")


def test_shapes_that_files_are_written_of_are_llavas():
    assert set(SHAPES) == {"tiny", "small", "medium", "tinyllama-1.1b", "llava-1.5-7b", "llava-1.5-13b"}
