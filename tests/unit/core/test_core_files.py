"""Files are replaced whole or not at all."""

import stat
from pathlib import Path

import pytest

from opsin.core.errors import BadParameter
from opsin.core.files import expand, replacing, write_whole


def test_a_file_is_written_whole_with_its_folder_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    write_whole(path, "ä")
    assert path.read_bytes() == "ä".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    write_whole(path, b"2", mode=0o644)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"2", 0o644)
    assert list(path.parent.iterdir()) == [path]


def test_an_error_in_between_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:  # noqa: PT012 - the block is what is tested
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_user_that_does_not_exist_is_one_sentence() -> None:
    assert expand("~/x") == Path.home() / "x"
    with pytest.raises(BadParameter, match="home folder that does not exist"):
        expand("~nosuchuser/x")
