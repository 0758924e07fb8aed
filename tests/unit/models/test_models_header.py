"""Reading the head of a GGUF file: as the reference reader reads it, and safely when it is broken."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.core.errors import ModelError, ModelNotFound, ModelUnreadable
from opsin.core.ggml_types import KV_TYPES, TENSOR_TYPES, bytes_per_value
from opsin.models import Pair, read_info
from opsin.models.gguf import MAX_KEYS, read_header


def test_the_table_of_tensor_types_is_the_one_of_the_gguf_package():
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: row for kind, row in TENSOR_TYPES.items() if kind in theirs} == theirs


def test_kv_types_are_types_of_that_table():
    assert {name: TENSOR_TYPES[kind][0].lower() for name, kind in KV_TYPES.items()} == {name: name for name in KV_TYPES}
    assert [bytes_per_value(name) for name in ("f16", "Q8_0")] == [2.0, 34 / 32]


def test_many_keys_are_refused_at_once_and_many_texts_are_read_fast(tmp_path: Path):
    path = tmp_path / "model.gguf"
    keys = b"".join(struct.pack("<Q6sIB", 6, b"%06d" % n, 0, 1) for n in range(300_000))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 300_000) + keys)
    started = time.perf_counter()
    with pytest.raises(ModelUnreadable, match="300,000 keys"):
        read_header(path)
    words = struct.pack("<QcIIQ", 1, b"k", 9, 8, 500_000) + struct.pack("<Q3s", 3, b"dog") * 500_000
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + words)
    assert read_header(path).lengths == {"k": 500_000}
    assert time.perf_counter() - started < 2


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ModelUnreadable, match="not a regular file"):
        read_info(tmp_path / "model.gguf")


@pytest.mark.parametrize("which", ["llm", "mmproj"])
def test_a_header_is_read_as_the_reference_reader_reads_it(tiny: Pair, which: str):
    path = getattr(tiny, which)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert [(t.name, t.shape, t.type) for t in ours.tensors] == [
        (t.name, tuple(int(length) for length in t.shape), t.tensor_type.name) for t in theirs.tensors
    ]
    assert [ours.data + t.offset + t.size for t in ours.tensors] == [t.data_offset + t.n_bytes for t in theirs.tensors]
    for name, reference in theirs.fields.items():
        if name.startswith("GGUF."):
            continue
        if reference.types[0] == gguf.GGUFValueType.ARRAY:
            assert ours.lengths[name] == len(reference.data)
        else:
            assert ours.metadata[name] == reference.contents()


def test_what_a_language_model_and_a_projector_say(tiny: Pair):
    text, vision = read_info(tiny.llm), read_info(tiny.mmproj)
    assert (text.architecture, text.width, text.context) == ("llama", 64, 4096)
    assert not text.is_projector
    assert text.projector_width is None
    assert vision.is_projector
    assert vision.has_vision
    assert (vision.projector, vision.projector_width) == ("mlp", 64)
    assert vision.quantisation == "F16"
    assert text.size == tiny.llm.stat().st_size


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"", "is empty"),
        (b"\xff\xd8\xff\xe0 a photograph", "is not a GGUF file"),
        (b"PK\x03\x04 weights", "PyTorch"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (struct.pack("<Q", 20) + b'{"a": 1}', "safetensors"),
        (b"tjgg\x03\x00\x00\x00", "old GGML"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1: only versions 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "ends in the middle of its header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "ends in the middle of its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(16), "ends in the middle of its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 63) + bytes(16), "ends in the middle of its header"),
        (b"GGUF" + struct.pack("<IQQQcIIQQ", 3, 0, 1, 1, b"k", 9, 8, 1, 1 << 63), "ends in the middle of its header"),
        (b"GGUF" + struct.pack("<IQQQcIIQQ", 3, 0, 1, 1, b"k", 9, 8, 2, 1 << 63), "ends in the middle of its header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, MAX_KEYS + 1) + bytes(13 * MAX_KEYS + 13), "65,537 keys"),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 99), "unknown kind 99"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "an array of a kind"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 60), "ends in the middle"),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 1, 0, 1, b"t", 9) + bytes(64), "of 9 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ17sII", 3, 0, 1, 17, b"general.alignment", 4, 0), "data alignment of 0"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "does not say what model it holds"),
    ],
)
def test_foreign_and_broken_files_are_refused_in_one_sentence(start: bytes, says: str, tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(start)
    with pytest.raises(ModelUnreadable, match=says) as error:
        read_info(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path):
    with pytest.raises(ModelNotFound, match="there is no file"):
        read_info(tmp_path / "none.gguf")
    with pytest.raises(ModelUnreadable, match="is a folder"):
        read_info(tmp_path)


def test_a_file_cut_anywhere_is_unreadable_and_never_a_crash(tiny: Pair, tmp_path: Path):
    """A broken download is the commonest damage; llama.cpp itself may end the process on some of these."""
    whole = tiny.llm.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 400, 7), *range(400, len(whole), 5_003), len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelUnreadable, match=r"download it again|is not a GGUF file"):
            read_info(path)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_altered_bytes_give_an_answer_or_one_sentence(tiny: Pair, tmp_path_factory, data):
    whole = bytearray(tiny.mmproj.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 2000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "altered.gguf"
    path.write_bytes(whole)
    with contextlib.suppress(ModelError):
        read_info(path)


def test_adapters_are_not_models(tmp_path: Path):
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_type("adapter")
    path = tmp_path / "lora.gguf"
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(ModelUnreadable, match="'adapter', not a model"):
        read_info(path)


def test_deepstack_counts_on_both_sides(tmp_path: Path):
    """Qwen3-VL hands over one embedding for the input and one for each deepstack layer, side by side."""
    import numpy as np

    def write(name: str, arch: str, keys: dict[str, object], tensors: dict[str, tuple[int, ...]]) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, arch)
        for key, value in keys.items():
            add = {int: writer.add_uint32, str: writer.add_string, bool: writer.add_bool}[type(value)]
            add(key, value)
        for tensor, shape in tensors.items():
            writer.add_tensor(tensor, np.zeros(shape, np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    text = write("q.gguf", "qwen3vl", {"qwen3vl.embedding_length": 32, "qwen3vl.n_deepstack_layers": 3}, {"t": (32,)})
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "qwen3vl_merger"}
    deep = {f"v.deepstack.{n}.fc1.weight": (4, 4) for n in (5, 11, 17)}
    vision = write("mmproj-q.gguf", "clip", keys, {"mm.2.bias": (32,), **deep})
    assert read_info(text).width == read_info(vision).projector_width == 128
