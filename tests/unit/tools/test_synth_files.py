"""Random-weight pairs: the same bytes for the same seed, never half a file, never much memory."""

from __future__ import annotations

import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest

from opsin.core.errors import BadInput, BadParameter
from opsin.models import Pair, read_info
from opsin.models.gguf import read_header
from opsin.models.pairing import check_pair
from synth import LLM_TYPES, MMPROJ_TYPES, SHAPES, write_pair, write_shape
from synth.text import llm_tensors
from synth.vision import clip_tensors
from synth.weights import BLOCK_BYTES, RandomWeights, Tensor

pytestmark = pytest.mark.slow  # together they take seconds, so `make check` leaves them out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("tiny"))


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(tiny: Pair, tmp_path: Path):
    again = write_pair("tiny", tmp_path / "again")
    other = write_pair("tiny", tmp_path / "other", seed=1)
    assert again.llm.read_bytes() == tiny.llm.read_bytes()
    assert again.mmproj.read_bytes() == tiny.mmproj.read_bytes()
    assert other.llm.read_bytes() != tiny.llm.read_bytes()
    assert other.mmproj.read_bytes() != tiny.mmproj.read_bytes()


@pytest.mark.parametrize("quantisation", LLM_TYPES)
def test_every_type_of_language_model_is_written_as_itself(quantisation: str, tmp_path: Path):
    pair = write_pair("tiny", tmp_path, quantisation=quantisation)
    info = read_info(pair.llm)
    assert pair.llm.name == f"tiny-{quantisation}.gguf"
    assert info.quantisation == quantisation.upper()
    assert {tensor.type for tensor in read_header(pair.llm).tensors} == {quantisation.upper(), "F32"}


@pytest.mark.parametrize("mmproj_type", MMPROJ_TYPES)
def test_every_type_of_projector_is_written_as_itself(mmproj_type: str, tmp_path: Path):
    pair = write_pair("tiny", tmp_path, mmproj_type=mmproj_type)
    info = read_info(pair.mmproj)
    assert pair.mmproj.name == f"mmproj-tiny-{mmproj_type}.gguf"
    assert info.is_all_f32 == (mmproj_type == "f32")
    assert mmproj_type.upper() in {tensor.type for tensor in read_header(pair.mmproj).tensors}


@pytest.mark.parametrize("quantisation", LLM_TYPES)
def test_weights_keep_their_spread_through_quantisation(quantisation: str, tmp_path: Path):
    pair = write_pair("tiny", tmp_path, quantisation=quantisation)
    tensor = tensors_of(pair.llm)["blk.0.ffn_down.weight"]
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert values.shape == (64, 128)
    assert values.std() == pytest.approx(128**-0.5, rel=0.05)


def test_no_two_tokens_share_a_row_even_when_the_ring_goes_round_many_times(tmp_path: Path):
    """Rows are cut from a ring of blocks; a ring whose length shares a factor with the row would repeat itself."""
    tensor = Tensor("output.weight", (4096, 6000), "q8_0", 1.0)
    path = tmp_path / "rows"
    with path.open("wb") as out:
        RandomWeights(0, [tensor]).write(tensor, out)
    rows = path.read_bytes()
    width = 4096 // 32 * BLOCK_BYTES["q8_0"]
    assert len(rows) == tensor.bytes == 6000 * width
    assert len({rows[start : start + width] for start in range(0, len(rows), width)}) == 6000


def test_a_file_is_written_in_a_tenth_of_its_size(tmp_path: Path):
    """A 7B file takes 30 s and 150 MB this way; here the shape is scaled so that the bound is tight."""
    shape = SHAPES["tiny"]
    text = replace(shape.text, width=2048, heads=16, kv_heads=8, feed_forward=5632, layers=4, vocabulary=4096)
    tracemalloc.start()
    try:
        pair = write_shape(replace(shape, name="big", text=text), tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pair.llm.stat().st_size > 200e6
    assert peak < 20e6
    check_pair(pair.llm, pair.mmproj)


def test_existing_files_are_kept_unless_forced(tmp_path: Path):
    pair = write_pair("tiny", tmp_path)
    pair.llm.write_bytes(b"mine")
    with pytest.raises(BadInput, match=r"tiny-q8_0\.gguf is there already: use --force"):
        write_pair("tiny", tmp_path)
    assert pair.llm.read_bytes() == b"mine"
    assert write_pair("tiny", tmp_path, force=True).llm.stat().st_size > 4


def test_a_broken_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = []

    def break_off(self: RandomWeights, tensor: Tensor, out: object) -> None:
        written.append(tensor)
        if len(written) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(RandomWeights, "write", break_off)
    with pytest.raises(KeyboardInterrupt):
        write_pair("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_rewrite_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = write_pair("tiny", tmp_path).llm.read_bytes()
    monkeypatch.setattr(RandomWeights, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(BadInput, match="could not be written: No space left"):
        write_pair("tiny", tmp_path, force=True, seed=3)
    assert (tmp_path / "tiny-q8_0.gguf").read_bytes() == before


def test_too_small_a_disk_is_noticed_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(1e9)))
    with pytest.raises(BadInput, match=r"has 1\.0 GB free and the pair needs 7\.8 GB"):
        write_pair("llava-1.5-7b", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be used as a folder"):
        write_pair("tiny", tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"shape": "huge"}, "there is no shape 'huge': choose one of tiny, small"),
        ({"shape": "tiny", "quantisation": "f32"}, "language model cannot be written as 'f32'"),
        ({"shape": "tiny", "mmproj_type": "q4_0"}, "projector cannot be written as 'q4_0'"),
    ],
)
def test_unknown_shapes_and_types_name_those_there_are(arguments: dict[str, str], says: str, tmp_path: Path):
    with pytest.raises(BadParameter, match=re.escape(says)):
        write_pair(out=tmp_path, **arguments)


def test_the_template_can_be_left_out(tmp_path: Path, tiny: Pair):
    bare = write_pair("tiny", tmp_path, template=False)
    assert "tokenizer.chat_template" in gguf.GGUFReader(tiny.llm).fields
    assert "tokenizer.chat_template" not in gguf.GGUFReader(bare.llm).fields


def test_shapes_have_the_sizes_of_what_they_are_named_for():
    def parameters(name: str) -> float:
        return sum(tensor.values for tensor in llm_tensors(SHAPES[name], "f16")) / 1e9

    assert parameters("llava-1.5-7b") == pytest.approx(6.74, abs=0.01)  # Llama 2 7B
    assert parameters("llava-1.5-13b") == pytest.approx(13.02, abs=0.01)  # Llama 2 13B
    assert parameters("tinyllama-1.1b") == pytest.approx(1.100, abs=0.001)  # TinyLlama-1.1B
    assert parameters("small") == pytest.approx(0.2, abs=0.02)
    assert SHAPES["small"].vision.patches == SHAPES["llava-1.5-7b"].vision.patches == 576
    assert SHAPES["tiny"].vision.patches == 16
    projector = list(clip_tensors(SHAPES["llava-1.5-7b"], "f16"))
    assert len(projector) == 377  # the published mmproj-model-f16.gguf, 624 MB
    assert sum(tensor.bytes for tensor in projector) == pytest.approx(624e6, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_shapes_are_ones_llama_cpp_can_run(shape):
    """Heads divide widths, head widths are even for rope, rows are whole blocks, and up is not mistaken for down."""
    text, vision = shape.text, shape.vision
    assert text.width % text.heads == 0
    assert text.heads % text.kv_heads == 0
    assert text.width // text.heads % 2 == 0
    assert vision.width % vision.heads == 0
    assert vision.image_size % vision.patch_size == 0
    assert vision.width != vision.feed_forward
    for tensor in llm_tensors(shape, "q8_0"):
        assert tensor.type in {"f32", "q8_0"}
