"""Which files belong together, and what is said when they do not."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from opsin.core.errors import ModelNotFound, PairMismatch
from opsin.models import Pair, read_info, resolve
from opsin.models.pairing import check_pair, family_warning, find_projector


def test_a_pair_that_fits_gives_both_accounts(tiny: Pair):
    text, vision = check_pair(tiny.llm, tiny.mmproj)
    assert text.width == vision.projector_width == 64


def test_swapped_files_are_named_as_swapped(tiny: Pair):
    with pytest.raises(PairMismatch, match="swap --model and --mmproj"):
        check_pair(tiny.mmproj, tiny.llm)


def test_a_projector_is_no_language_model(tiny: Pair):
    with pytest.raises(PairMismatch, match="is a projector, not a language model"):
        check_pair(tiny.mmproj, tiny.mmproj)


def test_a_language_model_is_no_projector_and_the_right_one_is_named(tiny: Pair):
    with pytest.raises(PairMismatch, match=r"not a projector; mmproj-tiny-f16\.gguf beside the model would fit"):
        check_pair(tiny.llm, tiny.llm)


def test_widths_that_differ_are_said_with_the_projector_that_fits(tiny: Pair, wide: Pair):
    with pytest.raises(PairMismatch) as error:
        check_pair(tiny.llm, wide.mmproj)
    said = str(error.value)
    assert "hands over 128 values a token and tiny-q8_0.gguf takes in 64" in said
    assert said.endswith("mmproj-tiny-f16.gguf beside the model would fit")


def test_without_a_fitting_neighbour_the_sentence_says_where_to_look(tiny: Pair, wide: Pair, tmp_path: Path):
    llm = shutil.copy(tiny.llm, tmp_path / "alone.gguf")
    with pytest.raises(PairMismatch, match="from the place the model came from"):
        check_pair(llm, wide.mmproj)


def test_a_projector_without_vision_is_refused(tiny: Pair, tmp_path: Path):
    deaf = tmp_path / "mmproj-audio.gguf"
    # The key's value is the byte behind its name and its kind (7, a bool).
    deaf.write_bytes(
        tiny.mmproj.read_bytes().replace(
            b"has_vision_encoder\x07\x00\x00\x00\x01", b"has_vision_encoder\x07\x00\x00\x00\x00"
        )
    )
    with pytest.raises(PairMismatch, match="has no vision encoder"):
        check_pair(tiny.llm, deaf)


def test_the_projector_beside_a_model_is_found(tiny: Pair):
    assert find_projector(tiny.llm) == tiny.mmproj


def test_no_projector_is_no_error(tiny: Pair, tmp_path: Path):
    assert find_projector(Path(shutil.copy(tiny.llm, tmp_path))) is None


def test_among_several_the_width_decides_first_then_the_name_then_the_quantisation(
    tiny: Pair, wide: Pair, tmp_path: Path
):
    llm = Path(shutil.copy(tiny.llm, tmp_path / "tiny-Q8_0.gguf"))
    shutil.copy(wide.mmproj, tmp_path / "mmproj-tiny-Q8_0.gguf")  # the best name, and it does not fit
    shutil.copy(tiny.mmproj, tmp_path / "mmproj-other-Q8_0.gguf")
    assert find_projector(llm).name == "mmproj-other-Q8_0.gguf"
    shutil.copy(tiny.mmproj, tmp_path / "mmproj-tiny-F16.gguf")
    assert find_projector(llm).name == "mmproj-tiny-F16.gguf"
    shutil.copy(tiny.mmproj, tmp_path / "mmproj-tiny-Q6_K.gguf")
    assert find_projector(llm).name == "mmproj-tiny-Q6_K.gguf"


def test_a_damaged_neighbour_does_not_hide_the_good_one(tiny: Pair, tmp_path: Path):
    llm = Path(shutil.copy(tiny.llm, tmp_path))
    (tmp_path / "mmproj-tiny-q8_0.gguf").write_bytes(b"GGUF")
    good = Path(shutil.copy(tiny.mmproj, tmp_path / "mmproj-x.gguf"))
    assert find_projector(llm) == good


def test_only_misfits_beside_a_model_are_refused(tiny: Pair, wide: Pair, tmp_path: Path):
    llm = Path(shutil.copy(tiny.llm, tmp_path))
    shutil.copy(wide.mmproj, tmp_path)
    with pytest.raises(PairMismatch, match="do not belong together"):
        find_projector(llm)


def test_a_part_of_a_split_model_says_which_part_to_give(tiny: Pair, tmp_path: Path):
    shutil.copy(tiny.llm, tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(ModelNotFound, match=r"is a later part of a split model: give m-00001-of-00002\.gguf"):
        check_pair(tmp_path / "m-00002-of-00002.gguf", tiny.mmproj)
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ModelNotFound, match=r"m-00002-of-00002\.gguf is missing"):
        check_pair(tmp_path / "m-00001-of-00002.gguf", tiny.mmproj)


@pytest.mark.parametrize(
    ("architecture", "projector", "warns"),
    [
        ("llama", "mlp", False),
        ("qwen2", "mlp", False),
        ("gemma3", "gemma3", False),
        ("qwen2vl", "qwen2.5vl_merger", False),
        ("qwen3vlmoe", "qwen3vl_merger", False),
        ("llama", "kind-of-tomorrow", False),
        ("llama", "gemma3", True),
        ("gemma3", "mlp", True),
        ("qwen2vl", "qwen3vl_merger", True),
        ("qwen2vl", None, True),
    ],
)
def test_families_that_differ_are_both_named(tiny: Pair, architecture: str, projector: str | None, warns: bool):
    text = replace(read_info(tiny.llm), architecture=architecture)
    warning = family_warning(text, replace(read_info(tiny.mmproj), projector=projector))
    assert (warning is not None) == warns
    if warning:
        assert f"the kind {projector or 'unknown'}" in warning
        assert f"a {architecture} model" in warning


def test_a_projector_of_another_family_is_warned_of_when_the_pair_is_meant(
    tiny: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    resolve(str(tiny.llm), str(tiny.mmproj))
    assert not caplog.records
    data = tiny.llm.read_bytes()
    llm = tmp_path / "gemma.gguf"
    llm.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x06\0\0\0\0\0\0\0gemma3", 1) + bytes(64))
    resolve(str(llm), str(tiny.mmproj))
    assert "different families" in caplog.text


def header(path: Path, architecture: str, texts: Mapping[str, str]) -> Path:
    """A GGUF file without tensors that says these things of itself."""
    writer = gguf.GGUFWriter(None, architecture)
    for key, text in texts.items():
        writer.add_string(key, text)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("text", "architecture", "vision", "kind", "families"),
    [
        ("LLaVA v1.5 7B", "llama", "Qwen2.5 VL 3B Instruct", "mlp", ("Qwen2.5-VL", "LLaVA")),
        ("LLaMA v2", "llama", "Qwen2.5_VL 3B", "mlp", ("Qwen2.5-VL", "llama")),
        ("LLaMA v2", "llama", "moondream2", "mlp", ("Moondream", "llama")),
        ("Qwen2.5 VL 3B", "qwen2vl", "SmolVLM2 2.2B", "idefics3", ("SmolVLM", "Qwen2.5-VL")),
        ("SmolVLM2 2.2B", "llama", "vit", "mlp", ("mlp", "SmolVLM")),
        ("LLaVA 1.6 Mistral", "llama", "vit", "idefics3", ("idefics3", "LLaVA")),
        ("Llava v1.5 7b", "llama", "BakLLaVA 1", "mlp", ("BakLLaVA", "LLaVA")),
        ("Qwen2 VL 2B", "qwen2vl", "Qwen2.5 VL 3B", "qwen2.5vl_merger", ("Qwen2.5-VL", "Qwen2-VL")),
        ("Gemma 3 4b It", "gemma3", "Gemma-3-4B-It", "gemma3", None),
        ("Medgemma 4b It", "gemma3", "Medgemma 4b It", "gemma3", None),
        ("TinyLlama 42M", "llama", "llava-v1.5", "mlp", None),
        ("LLaMA v2", "llama", "openai/clip-vit-large-patch14-336", "mlp", None),
        ("Mistral 7B Instruct v0.2", "llama", "llava-v1.6-mistral-7b", "mlp", None),
        ("Qwen2 7B", "qwen2", "llava-onevision", "mlp", None),
        ("Phi 3 Mini", "phi3", "llava-phi-3-mini", "mlp", None),
        ("Phi 2", "phi2", "llava-phi-2", "mlp", None),
        ("moondream2", "phi2", "vikhyatk/moondream2", "mlp", None),
        ("Mistral Small 3.1 24B", "llama", "Mistral Small 3.1 24B", "pixtral", None),
        ("Internvl3 2B", "qwen2", "Internvl3 2B", "internvl", None),
        ("Model", "qwen2", "MiniCPM-V-2_6", "resampler", None),
        ("New", "architecture-of-tomorrow", "New", "kind-of-tomorrow", None),
    ],
)
@pytest.mark.parametrize("key", ["general.name", "general.basename", "general.base_model.0.name"])
def test_names_in_the_files_tell_families_apart(
    text: str, architecture: str, vision: str, kind: str, families: tuple[str, str] | None, key: str, tmp_path: Path
):
    """Both files say how they are called and what they are based on; a LLaVA projector goes with many models."""
    llm = header(tmp_path / "m.gguf", architecture, {key: text})
    mmproj = header(tmp_path / "mmproj.gguf", "clip", {key: vision, "clip.projector_type": kind})
    warning = family_warning(read_info(llm), read_info(mmproj))
    assert (warning is None) == (families is None), warning
    assert all(family in (warning or "") for family in families or ())


def test_the_warning_shows_no_control_character(tiny: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    mmproj = tmp_path / "mmproj-\x1b]0;x.gguf"
    name = b"Random tiny projector"
    mmproj.write_bytes(tiny.mmproj.read_bytes().replace(name, b"Qwen2.5 VL 3B".ljust(len(name))))
    resolve(str(tiny.llm), str(mmproj))
    assert "Qwen2.5-VL" in caplog.text
    assert "\x1b" not in caplog.text
