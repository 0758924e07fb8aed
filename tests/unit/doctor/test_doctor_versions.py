"""Versions whose vision encoder stays off the GPU, and what old build flags mean today."""

import pytest

from opsin.doctor.install import FAULTS, known_bad, modern, split_flags, translate_flags


@pytest.mark.parametrize(
    "version",
    ["0.1.78", "0.2.39", "0.2.58", "0.2.60", "0.2.73", "0.3.6", "0.3.7", "0.3.8", "v0.2.60", "0.3.7+cu121", " 0.3.6"],
)
def test_a_known_bad_version_is_named_with_its_source(version: str) -> None:
    sentence = known_bad(version)
    assert sentence is not None
    assert version in sentence
    assert "https://github.com/" in sentence


@pytest.mark.parametrize("version", ["0.2.40", "0.2.56", "0.2.57", "0.2.74", "0.3.5", "0.3.9", "0.3.36", "0.20.60"])
def test_the_versions_before_and_after_are_good(version: str) -> None:
    assert known_bad(version) is None


@pytest.mark.parametrize("version", ["", "unknown", "master-abc1234", "0.3", "b4321"])
def test_what_is_no_version_is_not_judged(version: str) -> None:
    assert known_bad(version) is None


def test_the_table_is_in_order_and_its_ranges_do_not_meet() -> None:
    ends = [end for first, last, *_ in FAULTS for end in (first, last)]
    assert ends == sorted(set(ends))


def test_the_flags_of_the_founding_case() -> None:
    cublas, llava = translate_flags("-DLLAMA_CUBLAS=on -DLLAVA_BUILD=on")
    assert (cublas.old, cublas.new) == ("-DLLAMA_CUBLAS=on", "-DGGML_CUDA=on")
    assert "fatal error" in cublas.note
    assert not cublas.harmless
    assert (llava.new, llava.harmless) == ("", True)
    assert "libmtmd" in llava.note


@pytest.mark.parametrize(
    ("old", "new", "note"),
    [
        ("-DLLAMA_CUDA=ON", "-DGGML_CUDA=ON", "still works"),
        ("-DLLAMA_METAL=1", "-DGGML_METAL=1", "still works"),
        ("-DLLAMA_HIPBLAS=on", "-DGGML_HIP=on", "ignores"),
        ("-DGGML_HIPBLAS=on", "-DGGML_HIP=on", "ignores"),
        ("-DGGML_CUBLAS=on", "-DGGML_CUDA=on", "ignores"),
        ("-DLLAMA_VULKAN=on", "-DGGML_VULKAN=on", "ignores"),
        ("-DLLAMA_BLAS:BOOL=ON", "-DGGML_BLAS=ON", "ignores"),
        ("-DLLAMA_BLAS_VENDOR=OpenBLAS", "-DGGML_BLAS_VENDOR=OpenBLAS", "ignores"),
        ("-DLLAMA_OPENBLAS=on", "-DGGML_BLAS=on -DGGML_BLAS_VENDOR=OpenBLAS", "vendor"),
        ("-DLLAMA_CLBLAST=on", "-DGGML_VULKAN=on", "taken out"),
        ("-DLLAMA_KOMPUTE=on", "-DGGML_VULKAN=on", "taken out"),
        ("-DLLAMA_AVX2=off", "-DGGML_AVX2=off", "ignores"),
        ("-DLLAMA_AVX512_VNNI=on", "-DGGML_AVX512_VNNI=on", "ignores"),
        ("-DLLAMA_NATIVE=off", "-DGGML_NATIVE=off", "still works"),
        ("-DLLAMA_CLBLAST=off", "", "taken out"),
        ("-DLLAMA_CURL=on", "", "curl"),
        ("-DLLAVA_BUILD=off", "", "leaves out libmtmd"),
    ],
)
def test_each_old_flag_has_its_new_one(old: str, new: str, note: str) -> None:
    (found,) = translate_flags(old)
    assert (found.old, found.new) == (old, new)
    assert note in found.note
    assert not found.harmless


@pytest.mark.parametrize(
    "flags", ["", "-DGGML_CUDA=on", "-DCMAKE_CUDA_ARCHITECTURES=86", "-DLLAMA_BUILD=on", "-G Ninja", "-DLLAMA_AVX3=on"]
)
def test_flags_of_today_and_unknown_ones_are_left_alone(flags: str) -> None:
    assert translate_flags(flags) == []
    assert modern(flags) == flags


def test_flags_are_split_as_the_build_splits_them() -> None:
    assert split_flags('-DA=1 -D B=2;-DC="x y"') == ["-DA=1", "-DB=2", "-DC=x y"]
    assert split_flags("-DA='1 -DB=2") == ["-DA='1", "-DB=2"]


def test_a_semicolon_inside_a_value_stays_there() -> None:
    old = "-DLLAMA_CUBLAS=on -DCMAKE_CUDA_ARCHITECTURES=86;89;-DB=2;"
    assert split_flags(old)[1:] == ["-DCMAKE_CUDA_ARCHITECTURES=86;89", "-DB=2"]
    assert split_flags(modern(old)) == ["-DGGML_CUDA=on", "-DCMAKE_CUDA_ARCHITECTURES=86;89", "-DB=2"]


def test_the_rest_of_the_value_is_kept() -> None:
    old = '-DLLAMA_CUBLAS=on -DLLAVA_BUILD=on -DCMAKE_C_FLAGS="-O3 -g"'
    assert split_flags(modern(old)) == ["-DGGML_CUDA=on", "-DCMAKE_C_FLAGS=-O3 -g"]
