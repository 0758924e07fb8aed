"""Projectors converted to another type: what is in the file, how it is named, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from opsin.core.errors import ModelUnreadable
from opsin.models import read_info
from opsin.models.resolve import demo_pair
from opsin.tune.projector import TYPES, convert_projector, default_folder, keep


@pytest.fixture(scope="module")
def source() -> Path:
    path = demo_pair().mmproj
    assert path is not None
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_large_matrices_are_converted_and_all_else_is_copied(source: Path, tmp_path: Path, kind: str) -> None:
    import gguf
    from gguf.quants import dequantize

    made = convert_projector(source, kind, tmp_path / "made")  # type: ignore[arg-type]
    assert made is not None
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(made)
    old = {tensor.name: tensor for tensor in before.tensors}
    assert {tensor.name for tensor in after.tensors} == set(old)
    changed = [tensor.name for tensor in after.tensors if tensor.tensor_type != old[tensor.name].tensor_type]
    assert "v.blk.0.ffn_up.weight" in changed
    assert all(name.startswith(("v.blk.", "mm.")) and name.endswith(".weight") for name in changed)
    for tensor in after.tensors:
        was = old[tensor.name]
        a, b = dequantize(tensor.data, tensor.tensor_type), dequantize(was.data, was.tensor_type)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 0.01 * np.abs(b).max()
        assert tensor.name in changed or np.array_equal(tensor.data, was.data)
    assert read_info(made).quantisation == kind.upper()
    said, is_said = (
        {name: field.contents() for name, field in reader.fields.items() if name.startswith("clip.")}
        for reader in (before, after)
    )
    assert said == is_said


def test_a_conversion_is_named_after_the_state_of_the_file(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mmproj.gguf"
    copy.write_bytes(source.read_bytes())
    first = convert_projector(copy, "bf16", tmp_path / "made")
    assert first is not None
    assert convert_projector(copy, "bf16", tmp_path / "made") == first
    copy.write_bytes(source.read_bytes() + bytes(32))
    assert convert_projector(copy, "bf16", tmp_path / "made") != first
    # What is of that type already has nothing to be changed, and leaves nothing behind.
    assert convert_projector(first, "bf16", tmp_path / "again") is None
    assert not (tmp_path / "again").exists()


def test_what_is_kept_moves_to_the_users_cache(tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    made.write_bytes(b"x")
    assert keep(made) == default_folder() / "made.gguf"
    assert (default_folder() / "made.gguf").read_bytes() == b"x"
    assert not made.exists()


def test_what_is_no_projector_file_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "mmproj.gguf"
    broken.write_bytes(b"GIF89a" + bytes(100))
    with pytest.raises(ModelUnreadable, match=r"mmproj\.gguf cannot be converted"):
        convert_projector(broken, "q8_0", tmp_path / "made")
    assert not (tmp_path / "made").exists()
