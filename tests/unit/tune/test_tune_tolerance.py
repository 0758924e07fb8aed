"""Closeness of embeddings and answers, projectors converted, and the picture: on values that can be checked by hand."""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from opsin.bench import measure
from opsin.core.answer import TokenLogprob
from opsin.core.errors import EngineError, ModelUnreadable
from opsin.models.gguf import read_info
from opsin.models.synth import write_pair
from opsin.tune import finals
from opsin.tune.finals import play_final, workloads
from opsin.tune.pareto import Point
from opsin.tune.picture import plot_svg, plot_text
from opsin.tune.projector import convert_projector
from opsin.tune.search import Ratio
from opsin.tune.tolerance import closeness, drift


def row(token: int, logprob: float, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(token, b"", logprob, tuple((t, b"", p) for t, p in top))


def test_drift_is_the_largest_change_of_an_answered_token() -> None:
    before = (row(1, -0.1, (1, -0.1), (2, -2.0)), row(3, -1.0, (3, -1.0)))
    after = (row(1, -0.12, (1, -0.12), (2, -2.2)), row(3, -1.2, (3, -1.2)))
    assert drift(before, after) == pytest.approx(0.2)
    assert drift(before, before) == 0.0


def test_where_answers_part_the_other_token_must_have_been_as_likely() -> None:
    before = (row(1, -0.50, (1, -0.50), (2, -0.53), (4, -3.0)), row(9, -5.0))
    # What comes behind the parting has another text before it, and says nothing.
    behind = row(7, -0.1)
    assert drift(before, (row(2, -0.51), behind)) == pytest.approx(0.03)
    assert drift(before, (row(4, -0.4), behind)) == pytest.approx(2.5)
    assert drift(before, (row(5, -0.4), behind)) == float("inf")


def test_closeness_takes_the_worst_picture() -> None:
    same = np.eye(4, dtype=np.float32)
    other = same.copy()
    other[0] = [0, 1, 0, 0]
    near = closeness((same, same), (same * np.float32(2), other))
    assert near.row_cosine == 0.0
    assert near.cosine == pytest.approx(0.75)
    assert near.max_abs == pytest.approx(1.0)
    assert near.fails
    assert not closeness((same,), (same,)).fails
    # Rows that are not numbers are no agreement.
    assert closeness((same,), (same * np.float32("nan"),)).fails


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_pair("tiny", tmp_path_factory.mktemp("tiny")).mmproj
    assert path is not None
    return path


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_a_projector_is_converted_as_one_of_that_type_is_written(source: Path, tmp_path: Path, kind: str) -> None:
    import gguf
    from gguf.quants import dequantize

    made = convert_projector(source, kind, tmp_path / "made")  # type: ignore[arg-type]
    assert made is not None
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    wanted = write_pair("tiny", tmp_path, mmproj_type=kind).mmproj
    assert wanted is not None
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(wanted).tensors}
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    after = gguf.GGUFReader(made)
    assert {tensor.name: tensor.tensor_type for tensor in after.tensors} == types
    for tensor in after.tensors:
        old = before[tensor.name]
        a, b = dequantize(tensor.data, tensor.tensor_type), dequantize(old.data, old.tensor_type)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 0.01 * np.abs(b).max()
        assert tensor.tensor_type != old.tensor_type or np.array_equal(tensor.data, old.data)
    info = read_info(made)
    assert info.quantisation == kind.upper()
    metadata = {name: field.contents() for name, field in after.fields.items() if name.startswith("clip.")}
    assert metadata == {
        name: field.contents() for name, field in gguf.GGUFReader(source).fields.items() if name.startswith("clip.")
    }


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
    assert list((tmp_path / "again").iterdir()) == []


def test_what_is_no_projector_file_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "mmproj.gguf"
    broken.write_bytes(b"GIF89a" + bytes(100))
    with pytest.raises(ModelUnreadable, match=r"mmproj\.gguf cannot be converted"):
        convert_projector(broken, "q8_0", tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


POINTS = (
    Point("untuned", 2.0, 1.0),
    Point("quick & good", 1.0, 1.5, Ratio(0.5, 0.01), Ratio(0.66, 0.01)),
    Point("beaten", 1.5, 0.5),
)


def test_the_picture_is_well_formed_and_names_every_finalist() -> None:
    root = ET.fromstring(plot_svg(POINTS, POINTS[1]))
    labels = " ".join(filter(None, (text.text for text in root.iter("{http://www.w3.org/2000/svg}text"))))
    assert all(f"{point.name}: {point.latency_s:.2f} s" in labels for point in POINTS)
    spots = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert spots[1] == (64.0, 64.0)  # the quickest and the busiest: top left
    assert all(0 <= x <= 640 and 0 <= y <= 400 for x, y in spots)


def test_in_the_terminal_the_picked_one_is_a_star_and_a_single_one_is_drawn_too() -> None:
    text = plot_text(POINTS, POINTS[1])
    assert "* quick & good: 1.000 s, 1.500 answers/s" in text
    assert "  a untuned" in text
    assert text.splitlines()[1].startswith("  |*")
    assert "*" in plot_text(POINTS[:1], POINTS[0])


class _Driver:
    """Answers in no time with as many tokens as asked for, or with fewer."""

    def __init__(self, short: int = 0) -> None:
        self.asked = 0
        self.short = short

    def ask(self, picture: bytes, question: str, max_tokens: int):  # type: ignore[no-untyped-def]
        from opsin.core.answer import Usage

        self.asked += 1
        yield 1.0
        return Usage(completion_tokens=max_tokens - self.short)


@pytest.fixture
def _cheap_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (finals, measure):
        monkeypatch.setattr(room, "draw_pictures", lambda workload, _run: [b"picture"] * workload.pictures)


@pytest.mark.usefixtures("_cheap_pictures")
def test_finals_stop_when_another_round_would_be_too_late() -> None:
    drivers = (_Driver(), _Driver())
    asked: list[float] = []
    clock = iter(range(100))
    final = play_final(
        *drivers,
        workloads(2),
        noise=0.05,
        rounds=5,
        may_go_on=lambda seconds: asked.append(seconds) or len(asked) < 2,
        now=lambda: next(clock),
    )
    assert asked == [1, 1]
    assert final.latency.rounds == 2
    assert not final.latency.wins
    # A warm-up, and two rounds of two and two questions.
    assert [driver.asked for driver in drivers] == [9, 9]


@pytest.mark.usefixtures("_cheap_pictures")
def test_a_final_with_answers_of_another_length_counts_for_nothing() -> None:
    with pytest.raises(
        EngineError, match=r"2 new pictures, one after another count.* 31 tokens were answered where 32"
    ):
        play_final(_Driver(), _Driver(short=1), workloads(2), noise=0.05)
