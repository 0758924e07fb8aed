"""A proof of placement is made once for a setup, and again when it cannot be read."""

from pathlib import Path

import pytest

from opsin.core.model_info import BackendShare, Placement
from opsin.doctor.placement import remembered_placement as remembered

PROOF = Placement(
    encoder={"CUDA0": BackendShare(90, 0.9, 0.8, {"MUL_MAT": 40}, 7), "CPU": BackendShare(3, 0.1)},
    language_model={"CUDA0": BackendShare(100, 1.0)},
    layers_offloaded=32,
    layers=32,
    notes=("a note",),
)


def test_the_second_time_it_is_read(tmp_path: Path) -> None:
    asked: list[int] = []

    def prove() -> Placement:
        asked.append(1)
        return PROOF

    assert remembered("a", prove, tmp_path) == remembered("a", prove, tmp_path) == PROOF
    assert len(asked) == 1
    assert remembered("b", prove, tmp_path) == PROOF
    assert len(asked) == 2


@pytest.mark.parametrize("broken", ["", "{}", "[]", '{"encoder": 3}', "null"])
def test_a_broken_file_costs_a_new_proof(tmp_path: Path, broken: str) -> None:
    (tmp_path / "a.json").write_text(broken)
    assert remembered("a", lambda: PROOF, tmp_path) == PROOF
    assert remembered("a", lambda: pytest.fail("it was written"), tmp_path) == PROOF


def test_a_proof_of_a_version_that_knew_less_is_made_anew(tmp_path: Path) -> None:
    assert remembered("a", lambda: PROOF, tmp_path) == PROOF
    file = tmp_path / "a.json"
    file.write_text(file.read_text().replace('"splits"', '"other"'))
    asked: list[int] = []
    assert remembered("a", lambda: asked.append(1) or PROOF, tmp_path) == PROOF  # type: ignore[func-returns-value]
    assert asked == [1]


def test_a_folder_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert remembered("a", lambda: PROOF, tmp_path / "file" / "folder") == PROOF


def test_what_was_not_proved_is_unproven_until_it_is(tmp_path: Path) -> None:
    assert remembered("a", folder=tmp_path).as_dict() == {"proven": False}
    remembered("a", lambda: PROOF, tmp_path)
    known = remembered("a", folder=tmp_path)
    assert known == PROOF
    assert known.as_dict()["proven"] is True
