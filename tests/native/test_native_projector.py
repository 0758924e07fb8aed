"""What llama.cpp reads of a projector's header, and what it refuses."""

import struct
from pathlib import Path

import pytest

from opsin.core.errors import ModelUnreadable
from opsin.native.projector import read_projector


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def header(pairs: bytes, n_pairs: int, tensors: bytes = b"", n_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + pairs + tensors


PAIRS = (
    string("general.architecture") + struct.pack("<I", 8) + string("clip")
    + string("clip.projector_type") + struct.pack("<I", 8) + string("mlp")
    + string("clip.vision.image_mean") + struct.pack("<IIQ3f", 9, 6, 3, 0.5, 0.5, 0.5)
)  # fmt: skip
TENSOR = string("mm.0.weight") + struct.pack("<IQQIQ", 2, 64, 64, 1, 0)


def test_a_header_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    data = header(PAIRS, 3, TENSOR, 1)
    path.write_bytes(data.ljust(-(-len(data) // 32) * 32, b"\0") + bytes(64 * 64 * 2))
    assert read_projector(path) == ("mlp", 0, None)


@pytest.mark.parametrize(
    ("kind", "grid", "edge"), [("mlp", False, 336), ("mlp", True, 0), ("qwen2vl_merger", False, 0)]
)
def test_which_encoders_see_all_images_in_one_size(tmp_path: Path, kind: str, grid: bool, edge: int) -> None:
    """LLaVA-1.6 has the same type as LLaVA-1.5, and a grid of sizes."""
    pairs = string("clip.projector_type") + struct.pack("<I", 8) + string(kind)
    pairs += string("clip.vision.image_size") + struct.pack("<II", 4, 336)
    pairs += (string("clip.vision.image_grid_pinpoints") + struct.pack("<IIQ2i", 9, 5, 2, 336, 672)) * grid
    path = tmp_path / "mmproj.gguf"
    data = header(pairs, 2 + grid, TENSOR, 1)
    path.write_bytes(data.ljust(-(-len(data) // 32) * 32, b"\0") + bytes(64 * 64 * 2))
    assert read_projector(path).edge == edge


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"GIF89a" + b"\0" * 100,
        header(PAIRS, 3, TENSOR, 1)[:-9],
        header(PAIRS, 2**40),
        header(string("a") + struct.pack("<I", 77), 1),
        header(struct.pack("<Q", 2**62) + b"abc", 1),
        header(string("a") + struct.pack("<IIQ", 9, 6, 2**60), 1),
        header(string("a") + struct.pack("<IIQIIQ", 9, 9, 1, 9, 9, 1), 1),
        header(PAIRS, 3, string("t") + struct.pack("<I", 2**31), 1),
    ],
    ids=range(10),
)
def test_broken_headers_are_one_sentence_and_no_memory(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelUnreadable, match=r"broken\.gguf is missing or not a whole GGUF file"):
        read_projector(path)


def test_a_missing_projector_and_a_folder_are_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelUnreadable, match="is missing or not a whole GGUF file: check --mmproj"):
            read_projector(path)
