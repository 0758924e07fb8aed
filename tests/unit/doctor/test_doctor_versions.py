"""Versions whose vision encoder stays off the GPU, and what old build flags mean today."""

import pytest

from opsin.doctor.install import FAULTS, known_bad, modern, old_flags


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
    old = "-DLLAMA_CUBLAS=on -DLLAVA_BUILD=on"
    assert old_flags(old) == ["LLAMA_CUBLAS"]
    assert modern(old) == "-DGGML_CUDA=on -DLLAVA_BUILD=on"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("-DLLAMA_CUDA=ON", "-DGGML_CUDA=ON"),
        ("-DLLAMA_METAL=1", "-DGGML_METAL=1"),
        ("-DLLAMA_HIPBLAS=on", "-DGGML_HIP=on"),
        ("-DGGML_HIPBLAS=on", "-DGGML_HIP=on"),
        ("-DGGML_CUBLAS=on", "-DGGML_CUDA=on"),
        ("-DLLAMA_VULKAN=on", "-DGGML_VULKAN=on"),
        ("-DLLAMA_BLAS:BOOL=ON", "-DGGML_BLAS:BOOL=ON"),
        ("-DLLAMA_BLAS_VENDOR=OpenBLAS", "-DGGML_BLAS_VENDOR=OpenBLAS"),
        ("-DLLAMA_OPENBLAS=on", "-DGGML_BLAS_VENDOR=OpenBLAS -DGGML_BLAS=on"),
        ("-DLLAMA_CLBLAST=on", "-DGGML_VULKAN=on"),
        ("-DLLAMA_AVX2=off", "-DGGML_AVX2=off"),
        ("-D LLAMA_NATIVE=off", "-DGGML_NATIVE=off"),
        ('-DLLAMA_CUBLAS=on;-DCMAKE_C_FLAGS="-O3 -g"', '-DGGML_CUDA=on;-DCMAKE_C_FLAGS="-O3 -g"'),
    ],
)
def test_each_old_flag_has_its_new_one_and_the_rest_is_kept(old: str, new: str) -> None:
    assert len(old_flags(old)) == 1
    assert modern(old) == new
    assert old_flags(new) == []


@pytest.mark.parametrize(
    "flags", ["", "-DGGML_CUDA=on", "-DCMAKE_CUDA_ARCHITECTURES=86;89", "-DLLAMA_BUILD=on", "-G Ninja", "LLAMA_CUDA"]
)
def test_flags_of_today_and_unknown_ones_are_left_alone(flags: str) -> None:
    assert old_flags(flags) == []
    assert modern(flags) == flags
