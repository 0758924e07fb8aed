"""Random-weight pairs in llama.cpp itself: they load, see and speak, whatever type they are written in."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from native_help import draw, generate, prefill

from opsin.core.request import ImageChunk, ImagePart, SamplingParams, TextChunk, TextPart
from opsin.core.settings import EngineSettings
from opsin.models import Pair, read_info
from opsin.models.pairing import check_pair
from opsin.native import NativeBackend, open_backend
from synth import KINDS, SHAPES, write_pair
from synth.text import llm_tensors
from synth.vision import clip_tensors
from synth.vocabulary import make_vocabulary

PAIRS = [("f16", "f16"), ("bf16", "bf16"), ("q8_0", "q8_0"), ("q4_0", "f16")]


def opened(pair: Pair) -> NativeBackend:
    return open_backend(EngineSettings(model=pair.llm, mmproj=pair.mmproj, ctx=256, ubatch=64, threads=1))


def answered(backend: NativeBackend) -> list[int]:
    """Tokens of a greedy answer about an image, which are not all the same."""
    prompt = backend.tokenize([ImagePart(draw()), TextPart("\nWhat is this?\nASSISTANT:")], add_bos=True)
    position = prefill(backend, prompt)
    prompt.close()
    sampler = backend.sampler(SamplingParams(temperature=0, ignore_eos=True), seed=0)
    tokens = generate(backend, sampler, position, 16)
    sampler.close()
    assert len(set(tokens)) > 1
    return tokens


@pytest.mark.parametrize(("quantisation", "mmproj_type"), PAIRS)
def test_a_pair_of_any_type_sees_and_speaks(quantisation: str, mmproj_type: str, tmp_path: Path):
    backend = opened(write_pair("tiny", tmp_path, quantisation=quantisation, mmproj_type=mmproj_type))
    try:
        embeddings = []
        for seed in (1, 2):
            prompt = backend.tokenize([TextPart("USER: "), ImagePart(draw(seed))], add_bos=True)
            run = next(run for run in prompt.chunks if isinstance(run, ImageChunk))
            embeddings.append(backend.encode(run))
            prompt.close()
        assert [rows.shape for rows in embeddings] == [(16, 64), (16, 64)]
        assert all(0.1 < rows.std() < 10 for rows in embeddings)
        assert np.abs(embeddings[0] - embeddings[1]).mean() > 0.1
        answered(backend)
    finally:
        backend.close()


def test_llama_cpp_and_the_header_reader_agree(pair: Pair, shared: NativeBackend):
    text, vision = read_info(pair.llm), read_info(pair.mmproj)
    assert shared.limits.n_embd == text.width == vision.projector_width
    assert shared.info.architecture == text.architecture
    assert shared.info.projector == vision.projector
    assert shared.info.quantisation.upper().startswith(text.quantisation)


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_files_of_every_family_belong_together(kind: str, tmp_path: Path):
    pair, shape = write_pair(kind, tmp_path), SHAPES[kind]
    text, vision = check_pair(pair.llm, pair.mmproj)
    assert (text.architecture, vision.projector) == (shape.kind.architecture, shape.kind.projector)
    assert text.width == vision.projector_width == shape.text.width * (1 + len(shape.vision.deepstack))


def test_the_vocabulary_is_the_one_that_was_made_up(shared: NativeBackend):
    vocabulary = make_vocabulary(512)
    assert shared.limits.n_vocab == 512
    assert shared.eog_tokens == {2}
    prompt = shared.tokenize([TextPart("the rest\n\u00fc</s>")], add_bos=True)
    tokens = list(itertools.chain.from_iterable(run.tokens for run in prompt.chunks if isinstance(run, TextChunk)))
    assert tokens[0] == 1
    assert tokens[-1] == 2
    pieces = [vocabulary.tokens[token] for token in tokens[1:-1]]
    assert "<0x0A>" in pieces  # what is no word is spelt in bytes
    assert pieces[-2:] == ["<0xC3>", "<0xBC>"]
    assert b"".join(shared.piece(token) for token in tokens[1:-1]) == " the rest\n\u00fc".encode()
    assert len(pieces) < len("the rest") + 3  # and letters are merged to words
    prompt.close()


def test_a_pair_without_a_template_loads_too(tmp_path: Path):
    backend = opened(write_pair("tiny", tmp_path, template=False))
    assert not backend.model.chat_template
    backend.close()


def test_a_pair_with_a_template_shows_it(shared: NativeBackend):
    assert "USER: " in (shared.model.chat_template or "")


def test_a_vocabulary_of_152k_is_read_and_written(tmp_path: Path):
    backend = opened(write_pair("tiny-152k", tmp_path, quantisation="q4_0"))
    try:
        assert backend.limits.n_vocab == 151_936
        tokens = answered(backend)
        assert max(tokens) > 512
    finally:
        backend.close()


@pytest.mark.parametrize(("shape", "text", "vision"), [("qwen2.5-vl-7b", 7.616, 0.676), ("gemma-3-12b", 11.77, 0.42)])
def test_full_sizes_have_the_parameters_of_what_they_are_named_for(shape: str, text: float, vision: float):
    """In billions; the published numbers are of `model.language_model` and `model.visual`."""
    assert sum(tensor.values for tensor in llm_tensors(SHAPES[shape], "f16")) / 1e9 == pytest.approx(text, abs=0.01)
    assert sum(tensor.values for tensor in clip_tensors(SHAPES[shape], "f16")) / 1e9 == pytest.approx(vision, abs=0.005)
