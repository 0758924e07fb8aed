"""What is kept of an image's tokens, and how the exam's answers are counted."""

import numpy as np
import pytest

from keep_tokens import SHARES, Marks, cuts, most_diverse, project


def test_one_row_of_each_cluster_is_kept_also_in_the_projection():
    draw = np.random.default_rng(3)
    centres = draw.standard_normal((8, 1000), np.float32)
    clusters = draw.permutation(np.repeat(np.arange(8), 9))
    rows = centres[clusters] + 0.05 * draw.standard_normal((72, 1000), np.float32)
    rows *= draw.uniform(0.1, 10, (72, 1)).astype(np.float32)  # lengths do not count
    for seen in (rows, project(rows)):
        kept = most_diverse(seen, 8)
        assert sorted(clusters[kept]) == list(range(8))
        assert (np.diff(kept) > 0).all(), "kept tokens stay in order"
    assert list(most_diverse(rows, 72)) == list(range(72))


def test_the_projection_nearly_keeps_angles_and_is_fixed():
    draw = np.random.default_rng(4)
    rows = draw.standard_normal((40, 3000), np.float32) + 2 * draw.standard_normal((4, 3000), np.float32).repeat(10, 0)

    def cosines(of: np.ndarray) -> np.ndarray:
        unit = of / np.linalg.norm(of, axis=1, keepdims=True)
        return unit @ unit.T

    assert project(rows).shape == (40, 64)
    assert np.abs(cosines(project(rows)) - cosines(rows)).mean() < 0.12
    assert (project(rows) == project(rows.copy())).all()


def test_all_ways_of_a_share_keep_as_many_tokens():
    rows = np.random.default_rng(5).standard_normal((36, 8)).astype(np.float32)
    small = {share: rows[: int(36 * share)] for share in SHARES}
    found = cuts(rows, small, seed=0)
    counts = {(name, share): len(cut.rows) for (name, share), cut in found.items()}
    assert {share: {counts[one] for one in counts if one[1] == share} for share in (1, *SHARES)} == {
        1: {36}, 0.5: {18}, 0.25: {9}, 0.125: {4},
    }  # fmt: skip
    for cut in found.values():
        assert cut.places is None or (cut.rows == rows[cut.places]).all()
    assert found["pooled", 0.25].rows[0] == pytest.approx(rows[[0, 1, 6, 7]].mean(axis=0), abs=1e-6)
    assert list(found["every other row and column", 0.25].places) == [0, 2, 4, 12, 14, 16, 24, 26, 28]


def test_intervals_are_of_scenes_and_differences_of_pairs():
    marks = Marks()
    for scene in range(200):
        for _ in range(2):  # both questions about a scene fare alike
            good = scene % 2 == 0
            marks.add(scene, ("closed questions",), {"full": True, "50.0% diverse": good, "50.0% random": good})
    found = marks.shares(lambda way: "50.0% diverse" if way == "50.0% random" else None)
    diverse = found["50.0% diverse"]["closed questions"]
    assert (diverse["asked"], diverse["right"], diverse["share"]) == (400, 200, 0.5)
    assert diverse["to"] - diverse["from"] == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.15)
    assert found["full"]["closed questions"]["from"] == 1
    assert found["50.0% random"]["closed questions"]["diverse_better_by"] == [0, 0, 0]
