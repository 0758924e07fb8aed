"""The choices llama.cpp makes among the files of a repository (`common/download.cpp`), case by case."""

from __future__ import annotations

import pytest

from opsin.models.gguf import best_model, best_projectors, is_model, is_projector, part_names, stem, take_apart


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("m-Q4_K_M.gguf", ("m-Q4_K_M", "Q4_K_M", 1, 1)),
        ("dir/m.q8_0.gguf", ("dir/m.q8_0", "Q8_0", 1, 1)),
        ("m-BF16-00002-of-00003.gguf", ("m-BF16", "BF16", 2, 3)),
        ("model.gguf", ("model", "", 1, 1)),
        ("model.bin", ("model.bin", "", 0, 1)),
    ],
)
def test_names_are_taken_apart(path: str, expected: tuple[str, str, int, int]):
    assert take_apart(path) == expected


def test_models_and_projectors_are_told_by_name():
    assert is_model("a/model-Q4_0.gguf")
    assert is_model("m-00001-of-00002.gguf")
    for other in ("mmproj-m.gguf", "m-00002-of-00002.gguf", "imatrix.gguf", "mtp-m.gguf", "README.md", "m.gguf.part"):
        assert not is_model(other)
    assert is_projector("x/m-mmproj-f16.gguf")
    assert not is_projector("mmproj/m.gguf")


@pytest.mark.parametrize(
    ("files", "tag", "expected"),
    [
        (["m-F16.gguf", "m-Q8_0.gguf", "m-Q4_K_M.gguf"], "", "m-Q4_K_M.gguf"),
        (["m-F16.gguf", "m-Q8_0.gguf"], "", "m-Q8_0.gguf"),
        (["m-Q2_K.gguf", "m-F16.gguf"], "", "m-Q2_K.gguf"),
        (["m-F16.gguf", "m-q8_0.gguf"], "Q8_0", "m-q8_0.gguf"),
        (["m-F16.gguf", "m-Q8_0.gguf"], "Q4_0", None),
        (["mmproj-Q4_K_M.gguf"], "", None),
        (
            ["Q4_K_M/m-Q4_K_M-00002-of-00002.gguf", "Q4_K_M/m-Q4_K_M-00001-of-00002.gguf"],
            "",
            "Q4_K_M/m-Q4_K_M-00001-of-00002.gguf",
        ),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K.gguf"], "Q4_K", "m-Q4_K.gguf"),
    ],
)
def test_the_model_is_chosen_by_tag(files: list[str], tag: str, expected: str | None):
    assert best_model(files, tag) == expected


@pytest.mark.parametrize(
    ("files", "model", "expected"),
    [
        (["mmproj-f32.gguf", "mmproj-f16.gguf", "mmproj-Q8_0.gguf"], "m-Q4_K_M.gguf", "mmproj-Q8_0.gguf"),
        (["mmproj-f32.gguf", "mmproj-f16.gguf"], "m-Q4_K_M.gguf", "mmproj-f16.gguf"),
        (["mmproj-Q8_0.gguf", "a/mmproj-f32.gguf"], "a/m-Q8_0.gguf", "a/mmproj-f32.gguf"),
        (["b/mmproj-Q8_0.gguf", "mmproj-f32.gguf"], "a/m-Q8_0.gguf", "mmproj-f32.gguf"),
    ],
)
def test_the_projector_is_the_nearest_by_folder_then_by_quantisation(files: list[str], model: str, expected: str):
    assert best_projectors(files, model)[0] == expected


def test_projectors_of_other_folders_do_not_count():
    assert best_projectors(["b/mmproj-f16.gguf"], "a/m.gguf") == []
    assert best_projectors(["a/deep/mmproj-f16.gguf"], "a/m.gguf") == []


def test_the_parts_of_a_model_are_named_after_any_of_them():
    parts = [f"dir/m-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    assert part_names(parts[0]) == part_names(parts[1]) == parts
    assert part_names("m-Q8_0.gguf") == ["m-Q8_0.gguf"]


def test_quantisations_of_one_model_share_a_stem():
    assert stem("Model-7B-Q4_K_M.gguf") == stem("model-7b.f16.gguf") == stem("model-7b-BF16-00001-of-00009.gguf")
    assert stem("model-7b-f16.gguf") != stem("model-13b-f16.gguf")
